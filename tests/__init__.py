"""The tests, in the folders of the package."""

import importlib.metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
TINY_MODEL = ROOT / "configs" / "tiny_model"
# JAX 0.10's older emitters halve the compiler's time; 0.12 has no others than its own, and aborts on this flag.
COMPILER_FLAGS = "--xla_cpu_use_fusion_emitters=false " * importlib.metadata.version("jaxlib").startswith("0.10.")
# One module of machine code a program: to split it for many cores costs a tenth of the compiler's time.
COMPILER_FLAGS += "--xla_cpu_parallel_codegen_split_count=1"
"""For XLA_FLAGS, also of the processes that tests start."""
SAME_PROGRAMS = ["--config.optimizer.schedule=constant", "--config.evaluation.max_examples=16"]
"""For runs of configs/tiny.py: the step does not depend on the number of steps, so that it is compiled once for all."""
