"""Our KTO step compared with peers': tokens per second, memory and padding on the same model, rows, batch and threads.

    python -m benchmarks.kto                                    # the quickstart's reviews, and log-normal lengths
    python -m benchmarks.kto --sets quickstart --contenders kto_jax trl --rounds 5
    python -m benchmarks.kto --small                            # a random toy model, without peers; under a minute
    python -m benchmarks.kto --model=meta-llama/Llama-3.2-1B --dtype=bfloat16 --sets log_normal     # on a GPU

Contenders, each from the same weights, on the same batches, in the same order:

    kto_jax     the training step, packed as configs/quickstart.py packs (log-normal: row_length "auto")
    padded      the same step with a row for each example, padded to the longest of the batch
    plain_jax   a plain JAX step: padded rows, and the logits of all tokens
    trl         TRL's KTOTrainer with its defaults, and trl_stored without gradient checkpointing
    trl_liger   TRL with Liger's layer kernels, on a GPU; takes part only by name
    easydel     EasyDeL's KTOTrainer with its defaults, and easydel_saving with what it has to save memory; the latter
                is slow, and takes part only by name

They alternate: in each round every contender runs in a new process, with one warm-up step before the timed ones. No two
run at the same time, so none takes another's memory or cores. The peak matmul rate is measured between rounds. Each
peer has its own environment, created on first use in the cache; with --here, all use this one. A step is timed from a
ready batch to the updated policy, with programs compiled before. Tokens are the real tokens of matched rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.kto_sets import SETS, FeedbackSet, as_lists, pad_batch, padding_shares
from benchmarks.peers.jax_turn import save_batch
from kto_jax.config import to_dict
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.devices.chips import peak_flops
from kto_jax.models.attention.dense import dense_attention
from kto_jax.models.config import TransformerConfig
from kto_jax.models.layout import Layout
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config, weights_digest
from kto_jax.objectives import make_objective
from kto_jax.storage.fetch import local_path
from kto_jax.storage.folders import cache_directory
from kto_jax.training.flops import tokens_and_flops

ROOT = Path(__file__).parent.parent
console = Console()


@dataclasses.dataclass(frozen=True)
class Contender:
    """A contender.

    Attributes:
      module: the module that its process runs.
      batches: which of our batches it gets, for contenders that do not pad themselves.
      requirements: packages of its own environment; empty to run in ours.
      options: entries of its job.
    """

    module: str
    batches: str = "padded"
    requirements: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


TRL = ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0")
EASYDEL = ("easydel==0.3.0", "torch==2.13.0", "pillow==13.0.0")
CONTENDERS = {
    "kto_jax": Contender("ours", "packed"),
    "padded": Contender("ours"),
    "plain_jax": Contender("plain_jax"),
    "trl": Contender("trl", requirements=TRL, options=(("gradient_checkpointing", True),)),
    "trl_stored": Contender("trl", requirements=TRL, options=(("gradient_checkpointing", False),)),
    "trl_liger": Contender("trl", requirements=TRL, options=(("gradient_checkpointing", True), ("liger", True))),
    "easydel": Contender("easydel", requirements=EASYDEL, options=(("save_memory", False),)),
    "easydel_saving": Contender("easydel", requirements=EASYDEL, options=(("save_memory", True),)),
}
ONLY_BY_NAME = ("easydel_saving", "trl_liger")
WITHOUT_PEERS = ("kto_jax", "padded", "plain_jax")


def main() -> None:
    """Runs all contenders, prints a table for each set, and writes benchmarks/results/kto.json."""
    options = read_options()
    # Only the current contender may hold a GPU's memory, and none may use more cores than requested.
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": str(options.threads)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, every contender takes one
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    results["flops_check"] = flops_check()
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        with tempfile.TemporaryDirectory() as scratch:
            for result in measure(name, options, Path(scratch)):
                results[name] = {"machine": describe_machine(options), **result}
                out.write_text(json.dumps(results, indent=2) + "\n")
        console.print(make_table(name, results[name]))
        for contender, reason in results[name]["failed"].items():
            console.print(f"{contender} failed: {reason}", style="red", markup=False)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["quickstart", "log_normal"])
    usual = [name for name in CONTENDERS if name not in ONLY_BY_NAME]
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=usual)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default="", help="a path, wheel: or Hub id; the default is the set's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--profile", default="", help="a folder for traces of one step each, of contenders in JAX")
    parser.add_argument("--here", action="store_true", help="run peers in this environment, which has their packages")
    parser.add_argument("--small", action="store_true", help="a random toy model, two rounds, no peers")
    parser.add_argument("--out", default="benchmarks/results/kto.json")
    options = parser.parse_args()
    if options.small:
        options.sets, options.contenders, options.rounds = ["small"], list(WITHOUT_PEERS), 2
    return options


# ------------------------------------------------------------------------------------------------ the turns


def measure(name: str, options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """All rounds on one set.

    Yields:
      After each round: the settings, the peaks in FLOP/s, tokens and FLOPs of each step, shares of padding, every
      turn's figures by contender, why contenders failed, and a summary of each.
    """
    feedback = SETS[name](options.model)
    model_dir = export_model(feedback, scratch)
    job, batches = make_job(feedback, model_dir, options, scratch)
    device = jax.devices()[0]
    peaks = [peak_flops(device, options.dtype)[0]]
    turns: dict[str, list[dict[str, Any]]] = {contender: [] for contender in options.contenders}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for contender in options.contenders:
            if contender not in failed:
                console.print(f"{name}, round {number + 1} of {options.rounds}: {contender}")
                figures = take_turn(contender, job, scratch, options)
                if isinstance(figures, str):
                    failed[contender] = figures
                else:
                    turns[contender].append(figures)
        peaks.append(peak_flops(device, options.dtype)[0])
        result = {
            "settings": settings(job),
            "peak_flops": peaks,
            "steps": batches,
            "padding": padding_shares(feedback.schedule),
            "turns": {contender: taken for contender, taken in turns.items() if taken},
            "failed": failed,
        }
        yield result | {"summary": summarise(result)}


def make_job(
    feedback: FeedbackSet, model_dir: Path, options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Every contender's job, and real tokens and FLOPs of each timed step."""
    of_model = dataclasses.replace(feedback.config.model, dtype=options.dtype)
    config = dataclasses.replace(feedback.config, model=of_model)
    job: dict[str, Any] = {
        "model": str(model_dir),
        "config": to_dict(config),
        "max_length": config.data.max_length,
        "dtype": options.dtype,
        "threads": options.threads,
        "plain_remat": feedback.plain_remat,
        "rows": [],
        "packed": [],
        "padded": [],
    }
    model = Model.create(read_config(model_dir), dtype=options.dtype)
    objective = make_objective(config.objective, num_desirable=1, num_undesirable=1)
    steps = []
    for step in range(1 + options.steps):
        packed = feedback.schedule.batch(step)
        padded = pad_batch(packed)
        job["rows"].append(as_lists(packed))
        for kind, batch in (("packed", packed), ("padded", padded)):
            path = scratch / f"{kind}{step}.npz"
            save_batch(path, batch)
            job[kind].append(str(path))
        figures = tokens_and_flops(model, objective, jax.device_put(packed))
        steps.append({key: float(figures[key]) for key in ("tokens", "flops")})
    return job, steps[1:]


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """The entries of the job that explain the figures, without this machine's paths."""
    of_run = ("batch_size", "row_length", "microbatch_rows", "completion_share", "optimizer")
    return {key: job[key] for key in ("max_length", "dtype", "threads", "plain_remat")} | {
        "model": Path(job["config"]["model"]["path"]).name,
        "remat": job["config"]["model"]["remat"],
        **{key: job["config"][key] for key in of_run},
    }


def take_turn(name: str, job: dict[str, Any], scratch: Path, options: argparse.Namespace) -> dict[str, Any] | str:
    """Runs a contender once in its own process: its figures, with the first step's separate; or why it failed."""
    contender = CONTENDERS[name]
    here = options.here or not contender.requirements
    python = sys.executable if here else make_environment(contender)
    result, log = scratch / "result.json", scratch / "log.txt"
    result.unlink(missing_ok=True)
    job = job | dict(contender.options) | {"batches": job[contender.batches], "result": str(result)}
    job["profile"] = str(Path(options.profile).resolve() / name) if options.profile else ""
    path = scratch / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        # The second run reuses the first one's compiled programs; compilation is not timed.
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory() / "benchmarks" / "compiled"),
    }
    command = [str(python), "-m", f"benchmarks.peers.{contender.module}", str(path)]
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code or not result.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        console.print(*lines[-20:], sep="\n", style="dim", markup=False, highlight=False)
        return f"exit code {code}: {lines[-1] if lines else 'no message'}"
    return json.loads(result.read_text())


def make_environment(contender: Contender) -> Path:
    """The Python of a peer's own environment, created on first use; pip's settings decide where packages come from."""
    directory = cache_directory() / "benchmarks" / f"environment-{contender.module}"
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    wanted = "\n".join(contender.requirements)
    if not done.exists() or done.read_text() != wanted:
        console.print(f"making an environment with {', '.join(contender.requirements)}")
        venv.create(directory, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *contender.requirements], check=True)
        done.write_text(wanted)
    return python


def export_model(feedback: FeedbackSet, scratch: Path) -> Path:
    """The set's model as a Hugging Face directory, which all contenders read."""
    config = feedback.config.model
    source = local_path(config.path)
    if source.is_dir() and list(source.glob("*.safetensors")):
        return source
    model = Model.create(read_config(source))
    if config.init == "random":
        directory, params = scratch / "model", model.init_params(jax.random.key(0), "float32")
    else:
        directory = cache_directory() / "benchmarks" / f"model-{weights_digest(source)[:16]}"
        if directory.exists():
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        params = load_params(model, source, param_dtype="float32")
    # A folder of configs/architectures has no tokenizer, and random tokens need none.
    text = source if (source / "tokenizer.json").exists() else ROOT / "configs" / "tiny_model"
    tokenizer = prepare_tokenizer(text, scratch / "tokenizer", chat_template=feedback.config.data.chat_template)
    save_hugging_face(directory, model, params, tokenizer_dir=tokenizer.directory, model_card="For benchmarks.kto.\n")
    return directory


# ------------------------------------------------------------------------------------------------ the figures


def summarise(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of each contender.

    Returns:
      Of each contender: tokens_per_second, the median over its turns; ratio, the median over rounds of kto_jax's tokens
      per second by its own; seconds of a step; share_of_peak, the FLOPs that a step needs at real tokens by its time
      and the median peak; peak_bytes, the most of all turns; first_loss_difference and loss_difference, of the first
      loss and the largest of all, to those of plain_jax (else of the first contender).
    """
    tokens, flops = (sum(step[name] for step in result["steps"]) for name in ("tokens", "flops"))
    peak, turns = statistics.median(result["peak_flops"]), result["turns"]
    if not turns:
        return {}
    expected = turns.get("plain_jax", next(iter(turns.values())))[0]["losses"]
    rates = {name: [tokens / sum(turn["seconds"][1:]) for turn in taken] for name, taken in turns.items()}
    summary = {}
    for name, taken in turns.items():
        ours = rates.get("kto_jax", rates[name])
        rate = statistics.median(rates[name])
        differences = [abs(a - b) for turn in taken for a, b in zip(turn["losses"], expected, strict=True)]
        summary[name] = {
            "tokens_per_second": rate,
            "ratio": statistics.median(a / b for a, b in zip(ours, rates[name], strict=False)),
            "seconds": statistics.median(second for turn in taken for second in turn["seconds"][1:]),
            "share_of_peak": flops * rate / tokens / peak,
            "peak_bytes": max(turn["device_peak_bytes"] or turn["peak_bytes"] for turn in taken),
            "first_loss_difference": abs(taken[0]["losses"][0] - expected[0]),
            "loss_difference": max(differences),
        }
    return summary


def make_table(name: str, result: dict[str, Any]) -> Table:
    """The summary as text."""
    steps = result["steps"]
    packed, padded = result["padding"]["packed"], result["padding"]["padded"]
    tokens = statistics.mean(step["tokens"] for step in steps)
    peak = statistics.median(result["peak_flops"])
    title = (
        f"{name}: {tokens:,.0f} real tokens a step; padding {packed:.1%} packed, {padded:.1%} padded to the longest; "
        f"peak {peak / 1e9:,.0f} GFLOP/s"
    )
    columns = ("contender", "s a step", "tokens/s", "kto_jax by it", "of peak", "peak GB", "loss differs")
    table = Table(*columns, title=title)
    for contender, figures in result["summary"].items():
        table.add_row(
            contender,
            f"{figures['seconds']:.3g}",
            f"{figures['tokens_per_second']:,.1f}",
            f"{figures['ratio']:.2f}×",
            f"{figures['share_of_peak']:.1%}",
            f"{figures['peak_bytes'] / 1e9:.1f}",
            f"{figures['loss_difference']:.0e}",
        )
    return table


def flops_check() -> dict[str, float]:
    """The formula of `work` compared with XLA's count, for forward and backward pass over all tokens' logits.

    XLA counts the body of a loop once, however often it runs. The model here therefore has one layer and dense
    attention over rows of one chunk of queries: each loop runs once, so the counts are comparable. This attention
    multiplies each query with all keys, which the formula accounts for.

    Returns:
      FLOPs by formula, FLOPs by XLA, and XLA's divided by the formula's: norms, rotations and softmax are the
      difference.
    """
    architecture = TransformerConfig(
        vocab_size=4096, embed_dim=512, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1536
    )
    model = Model.create(architecture, remat="none", layout=Layout(attention=dense_attention))
    rows, length = 4, 256

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        hidden = model.hidden_states(params, tokens, jnp.ones_like(tokens), positions)
        return jnp.mean(jax.nn.logsumexp(model.logits(params, hidden), axis=-1))

    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(model.abstract_params("float32"), tokens).compile()
    analysis: Any = compiled.cost_analysis()
    formula = 3 * rows * length * architecture.flops_per_token(attended=length)
    return {"formula": formula, "xla": analysis["flops"], "ratio": analysis["flops"] / formula}


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions; no names of hosts or people."""
    device, cpu = jax.devices()[0], platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device.device_kind,
        "peak_source": peak_flops(device, options.dtype)[1],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
