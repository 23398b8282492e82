"""Programs are compiled once for each shape, beside other work, and kept between runs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kto_jax.devices import compilation
from kto_jax.devices.compilation import Program, compiler_options, give_back_memory, keep_compiled
from kto_jax.storage.folders import cache_directory

SCRIPT = """
import jax, jax.monitoring, jax.numpy as jnp
from kto_jax.devices.compilation import keep_compiled
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/")[-1]))
keep_compiled()
jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir, events.count("cache_hits"), events.count("cache_misses"))
"""


def run(cache, **environment):
    names = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "JAX_ENABLE_COMPILATION_CACHE")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    fixed = {"KTO_JAX_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | fixed | environment, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    directory, hits, misses = done.stdout.split()
    return directory, int(hits), int(misses)


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    directory, hits, misses = run(tmp_path)
    assert directory.startswith(str(tmp_path / "compiled"))
    assert hits == 0
    assert misses > 0
    assert run(tmp_path) == (directory, misses, 0)


def test_jax_own_settings_come_first(tmp_path):
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[0] == str(tmp_path / "own")
    assert not (tmp_path / "compiled").exists()
    run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "compiled").exists()


def test_the_folder_names_what_the_processor_can_do(monkeypatch):
    monkeypatch.setattr("kto_jax.devices.compilation.Path.read_text", lambda path: "flags : fpu sse2\n")
    with jax_setting_restored():
        keep_compiled()
        old = jax.config.jax_compilation_cache_dir
        monkeypatch.setattr("kto_jax.devices.compilation.Path.read_text", lambda path: "flags : fpu sse2 avx512\n")
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled()
        assert old != jax.config.jax_compilation_cache_dir
        assert old.startswith(str(cache_directory()))


class jax_setting_restored:
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")

    def __enter__(self):
        self.former = {name: getattr(jax.config, name) for name in self.names}
        jax.config.update("jax_compilation_cache_dir", None)

    def __exit__(self, *error):
        for name, value in self.former.items():
            jax.config.update(name, value)


def count_traces():
    traced = []

    @jax.jit
    def function(state, batch):
        traced.append(batch.shape)
        return state + jnp.sum(batch)

    return function, traced


def test_each_shape_is_compiled_once():
    function, traced = count_traces()
    program = Program(function)
    for size in (2, 3, 2, 3):
        assert program(jnp.ones(()), jnp.ones(size)) == 1 + size
    assert traced == [(2,), (3,)]


def test_a_call_uses_the_program_that_is_being_compiled(monkeypatch):
    function, traced = count_traces()
    compiled, compile_one = [], Program._compile
    monkeypatch.setattr(Program, "_compile", lambda *these: (compiled.append(these), compile_one(*these)))
    program = Program(function)
    program.begin(jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32))
    assert program(jnp.ones(()), jnp.ones(4)) == 5
    assert traced == [(4,)]
    waited = program.compile_seconds
    assert waited > 0
    program(jnp.ones(()), jnp.ones(4))
    assert program.compile_seconds == waited
    assert len(compiled) == 1
    program(jnp.ones(()), jnp.ones(5))
    assert len(compiled) == 2
    program.compile_seconds = 1000.0
    program(jnp.ones(()), jnp.ones(6))
    assert program.compile_seconds > 1000


def test_compiling_happens_in_the_background():
    threads = []

    @jax.jit
    def function(state, batch):
        threads.append(threading.current_thread())
        return state

    program = Program(function)
    program.begin(jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32))
    program(jnp.ones(()), jnp.ones(4))
    assert threads[0] is not threading.main_thread()


def test_errors_of_background_compilation_are_raised_by_the_call():
    @jax.jit
    def function(state, batch):
        raise ValueError("no such program")

    program = Program(function)
    program.begin(jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32))
    with pytest.raises(ValueError, match="no such program"):
        program(jnp.ones(()), jnp.ones(4))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc alone keeps freed memory so")
def test_freed_memory_goes_back_to_the_system():
    def private_kib():
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon")))

    pieces = [bytes(1000) for _ in range(100_000)]
    above = [bytes(1000) for _ in range(100)]  # blocks above keep the C library from freeing those below
    del pieces
    kept = private_kib()
    give_back_memory()
    assert kept - private_kib() > 50_000
    assert above


@pytest.fixture
def options_of_cpus(monkeypatch):
    monkeypatch.setitem(compilation.COMPILER_OPTIONS, "cpu", {"xla_one": True, "xla_another": True})
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("flags", "libtpu_flags", "left"),
    [
        ("", "", {"xla_one": True, "xla_another": True}),
        ("--xla_other=1 --xla_one=false", "", {"xla_another": True}),
        ("", "-xla_another --xla_onerous=1", {"xla_one": True}),
        ("--noxla_one", "--xla_another=true", {}),
    ],
)
def test_options_that_the_user_sets_stay_the_users(flags, libtpu_flags, left, options_of_cpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", libtpu_flags)
    assert compiler_options("cpu") == left and compiler_options("gpu") == {}


def test_flags_in_a_file_are_the_users_too(options_of_cpus, monkeypatch, tmp_path):
    (tmp_path / "flags").write_text("--xla_other=1\n--xla_one=false\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert compiler_options("cpu") == {"xla_another": True}


def test_a_program_is_compiled_with_its_platforms_options(monkeypatch):
    given = []
    function, _ = count_traces()
    program = Program(function)
    monkeypatch.setattr(compilation, "compiler_options", lambda platform: given.append(platform) or {})
    assert program(jnp.ones(()), jnp.ones(4)) == 5 and given == ["cpu"]


def test_options_that_the_compiler_does_not_know_are_left_out_and_named_once(options_of_cpus, caplog):
    compilation._log_unknown.cache_clear()
    function, _ = count_traces()
    program = Program(function)
    assert [program(jnp.ones(()), jnp.ones(size)) for size in (4, 5)] == [5, 6]
    assert sorted(message.split(",")[0] for message in caplog.messages) == [
        "compiled without xla_another", "compiled without xla_one",
    ]  # fmt: skip


def test_other_errors_of_the_compiler_are_raised(options_of_cpus):
    class Lowered:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no memory"):
        compilation.compile_lowered(Lowered(), "cpu")
