"""Temporary memory of a training step against the length of its rows and the size of the vocabulary.

    python -m benchmarks.step_memory
    python -m benchmarks.step_memory --topology=v5e:1x1     # one TPU chip, compiled ahead of time without hardware

Compiles KTO's step from shapes alone, and prints the memory that the compiler needs beyond the arguments: gradients of
the policy, and activations. Gradients grow with the embedding table, so they have a column of their own. The last
column is the size of all logits of the completions, an array that the step never materialises.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kto_jax.config import Config
from kto_jax.models.config import TransformerConfig
from kto_jax.objectives import check_objective
from kto_jax.planning.compile_step import Lengths, Task, compile_step
from kto_jax.planning.topology import LOCAL, Topology, open_topology

MIB = 2**20
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
VOCABULARIES = (32_768, 131_072, 262_144)
FIXED_LENGTH, FIXED_VOCABULARY = 2048, 32_768


def measure(length: int, vocabulary: int, topology: Topology) -> dict[str, float]:
    """MiB of one step over one row: beyond the arguments, gradients alone, and all logits."""
    architecture = TransformerConfig(
        vocab_size=vocabulary, embed_dim=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=768,
        max_length=max(LENGTHS), tied_head=True,
    )  # fmt: skip
    plain = Config()
    config = dataclasses.replace(
        plain,
        batch_size=1,
        microbatch_rows=1,
        row_length=length,
        data=dataclasses.replace(plain.data, max_length=length),
        reference=dataclasses.replace(plain.reference, param_dtype="float32"),
    )
    task = Task(architecture, check_objective(config.objective))
    program = compile_step(config, task, topology, Lengths(total=length, completion=length // 2))
    gradients = 4 * architecture.num_params()
    return {
        "length": length,
        "vocabulary": vocabulary,
        "temporary_mib": program.temporaries / MIB,
        "gradients_mib": gradients / MIB,
        "beside_gradients_mib": (program.temporaries - gradients) / MIB,
        "all_logits_mib": 4 * (length // 2) * vocabulary / MIB,
    }


def main() -> None:
    """Prints the table and writes it to benchmarks/results/step_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default=LOCAL, help="as of kto_jax.plan")
    parser.add_argument("--out", default="benchmarks/results/step_memory.json")
    options = parser.parse_args()
    topology = open_topology(options.topology)
    sizes = [(length, FIXED_VOCABULARY) for length in LENGTHS]
    sizes += [(FIXED_LENGTH, vocabulary) for vocabulary in VOCABULARIES]
    results = [measure(*size, topology) for size in sizes]
    table = Table("length", "vocabulary", "temporary, MiB", "gradients", "beside gradients", "all logits")
    for one in results:
        table.add_row(f"{one['length']:,}", f"{one['vocabulary']:,}", *(f"{one[key]:,.0f}" for key in list(one)[2:]))
    Console().print(table)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps({"device": topology.devices[0].device_kind, "results": results}, indent=1))


if __name__ == "__main__":
    main()
