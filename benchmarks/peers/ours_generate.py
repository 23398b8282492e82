"""Our sampling, over all prompts at once or over one static batch after the other: `kto_jax` and `static`."""

from __future__ import annotations

import time

import jax

from benchmarks.peers.turn import read_job, report
from kto_jax.models.model import Model
from kto_jax.models.unstacked import transpose_layers
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.sampling.sample import Sampling, sample

NEVER = -1


def main() -> None:
    """Runs the job."""
    job = read_job()
    model = Model.create(read_config(job["model"]), dtype=job["dtype"], remat="none")
    # As `complete` keeps them.
    params = transpose_layers(load_params(model, job["model"], param_dtype=job["dtype"]))
    prompts = job["prompts"][: job["num_prompts"]]
    size = job["slots"] if job["contender"] == "static" else len(prompts)
    eos_ids = job["eos_ids"] if job["stops"] else NEVER

    def complete(seed: int, prompts: list[list[int]]) -> int:
        drawn = [
            sample(
                model, params, prompts[start : start + size], Sampling(max_new_tokens=job["max_new_tokens"]),
                eos_id=eos_ids, key=jax.random.key(seed), batch_size=min(job["slots"], job["num_prompts"]),
            )
            for start in range(0, len(prompts), size)
        ]  # fmt: skip
        return sum(len(ids) for batch in drawn for ids in batch)

    complete(0, prompts[-job["slots"] - 1 :])  # compiles, also the prefill of one prompt alone
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = complete(1, prompts)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    report(job, tokens=tokens, seconds=seconds, cpu_seconds=cpu_seconds, versions={"jax": jax.__version__})


if __name__ == "__main__":
    main()
