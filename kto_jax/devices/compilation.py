"""Compiled programs: cached between runs, and compiled in the background."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kto_jax.storage.folders import cache_directory

_LARGEST_CACHE = 16 * 2**30
"""Bytes of cached programs; the least recently used are deleted first."""
COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}
"""XLA's options of the training step, by platform. On v5p devices would otherwise wait for every collective; none of
these has an effect alone. GPUs need none: see docs/scale.md."""


def compiler_options(platform: str) -> dict[str, bool]:
    """XLA's options for a platform's programs, without those that XLA_FLAGS or LIBTPU_INIT_ARGS set.

    All processes of a run must have equal variables, or they compile different programs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("-"):
        flags = Path(flags).read_text()  # XLA reads such a file.
    given = set(re.findall(r"(?:^|\s)--?(?:no)?(xla_\w+)", f"{flags} {os.environ.get('LIBTPU_INIT_ARGS', '')}"))
    return {name: value for name, value in COMPILER_OPTIONS.get(platform, {}).items() if name not in given}


def compile_lowered(lowered: Any, platform: str) -> Any:
    """Compiles a lowered program with its platform's options; those that this compiler does not know are left out."""
    options = compiler_options(platform)
    while True:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or options.pop(unknown[1], None) is None:
                raise
            _log_unknown(unknown[1])


@functools.cache
def _log_unknown(name: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger(__name__).warning(
            "compiled without %s, which this compiler does not know: collectives may overlap less with products", name
        )


def keep_compiled() -> None:
    """Caches compiled programs in the cache directory, so that the next run of the same shapes starts at once.

    JAX's own settings take precedence: JAX_COMPILATION_CACHE_DIR chooses another folder (a bucket is one too), and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 (the attribute is made when it runs)
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled" / _processor()))
        jax.config.update("jax_compilation_cache_max_size", _LARGEST_CACHE)


def give_back_memory() -> None:
    """Returns freed memory to the system: the C library would keep the hundreds of megabytes that compilation used."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _processor() -> str:
    """Names the processor's features: a program for one CPU may not run on another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


class Program:
    """A jitted function (state, batch) -> results, compiled once for each shape of the batch.

    Attributes:
      compile_seconds: total time that calls have waited for compilation.
    """

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self._function: Any = function
        self._programs: dict[Any, Callable[[Any, Any], Any]] = {}
        self._begun: concurrent.futures.Future | None = None
        self.compile_seconds = 0.0

    def begin(self, state: Any, batch: Any) -> None:
        """Starts compiling for arguments of these shapes in the background, if no program for them is there.

        Args:
          state: abstract arrays with shardings.
          batch: likewise.
        """
        if _shapes(batch) in self._programs:
            return
        thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._begun = thread.submit(self._compile, state, batch)
        thread.shutdown(wait=False)

    def is_ready(self, batch: Any) -> bool:
        """Whether the program for this batch is compiled."""
        if self._begun:
            return self._begun.done()
        return _shapes(batch) in self._programs

    def __call__(self, state: Any, batch: Any) -> Any:
        """Calls the function, after waiting for its program to be compiled."""
        shapes = _shapes(batch)
        if self._begun or shapes not in self._programs:
            started = time.perf_counter()
            if self._begun:
                self._begun.result()
                self._begun = None
            if shapes not in self._programs:
                self._compile(state, batch)
            self.compile_seconds += time.perf_counter() - started
        return self._programs[shapes](state, batch)

    def _compile(self, state: Any, batch: Any) -> None:
        lowered = self._function.lower(state, batch)
        self._programs[_shapes(batch)] = compile_lowered(lowered, _platform_of(state))
        give_back_memory()


def _shapes(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(leaf.shape for leaf in leaves)


def _platform_of(state: Any) -> str:
    """The platform of the devices that hold a state, or of the default device."""
    sharding = getattr(jax.tree.leaves(state)[0], "sharding", None)
    return next(iter(sharding.device_set)).platform if sharding else jax.default_backend()
