"""Tests run on 8 fake CPU devices; every warning is an error and no array is broadcast to more axes silently."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

from tests import COMPILER_FLAGS

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for all processes of the tests, because many compile the same programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kto_jax_compiled_")
    # To write the many programs of one operation takes longer than to compile them again.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if os.environ.get("KTO_JAX_TESTS_ON") == "gpu":
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of the time of the tests is spent in the compiler, hardly any in what it compiles.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" {COMPILER_FLAGS} --xla_force_host_platform_device_count=8"
)

import jax
import jaxtyping
import pytest

import tests.typechecker

# Before anything of the package is imported. Subprocesses of the tests run without checks.
jaxtyping.install_import_hook(tests.typechecker.MODULES, "tests.typechecker.check")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell that starts the tests in the background makes them ignore Ctrl-C, and with them every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# As does nohup of the end of a terminal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# JAX makes many objects while it traces: to look for garbage among all of transformers after every 700 of them takes an
# eighth of the time of the tests.
gc.set_threshold(50_000, 10, 20)
# No test outlives a power cut. The subprocesses of the tests do flush.
os.fsync = lambda descriptor: None


_WHOLE_RUNS = ("commands", "exports", "packaging", "sampling", "training")
"""Folders whose files take long."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Runs all tests in a process for each core, but at most 4, of up to 6 GB each; named files in one process."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else min(os.cpu_count() or 1, 4)


def pytest_configure() -> None:
    """Saves time in every run that tests make in-process; the subprocesses of the tests are as users start them."""
    from kto_jax.data import workers
    from kto_jax.reports import charts
    from tests import kept_pool

    workers.ProcessPoolExecutor = kept_pool.open_pool
    figure = charts.Figure
    charts.Figure = lambda figsize, layout: figure(figsize)  # Finding room for the labels takes longer than drawing.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts whole runs first: each worker takes one file after the other, and the longest must not be the last."""
    items.sort(key=lambda item: item.path.parent.name not in _WHOLE_RUNS)
