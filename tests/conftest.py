"""Tests run on 8 fake CPU devices; every warning is an error and arrays never gain axes silently."""

import atexit
import os
import shutil
import signal
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One for all processes of the tests: many compile the same programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kto_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Who starts the tests in the background makes them deaf to Ctrl-C, and all processes that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
