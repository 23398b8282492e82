"""Runs the parts of `benchmarks/gpu.sh` one after the other, each in a process with a time limit.

After each part its figures are in gpu.json, its output in gpu.log and all figures so far in gpu.md. A part that has
figures already is skipped. A part that fails or reaches its limit does not end the others; what it had measured by then
is kept. Parts are in order of value, and none starts that the remaining time is too short for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GIB = 2**30
LLAMA = "configs/architectures/llama_3_2_1b"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
      title: what it measures.
      expected: seconds that it should take on an H200.
      limit: seconds after which it is killed.
      command: the module and its arguments; OUT stands for the file of its figures.
      toy: the same for a rehearsal on the CPU.
      gib: memory of the card that the process may use; 0 for nearly all.
    """

    title: str
    expected: int
    limit: int
    command: str
    toy: str
    gib: int = 0


_STEP = "benchmarks.device_step --dtype=bfloat16 --out=OUT"
_TOY_STEP = "benchmarks.device_step --out=OUT --steps=1"
_ROWS = "--lengths 4096 --per-row=4"
PARTS = {
    "correctness": Part(
        "attention, decoding, head, step and sampling, by the tests marked gpu",
        80,
        150,
        "pytest -q -n 0 -p no:cacheprovider -p no:warnings -m gpu tests/gpu",
        "pytest -q -n 0 -p no:cacheprovider -p no:warnings -m gpu tests/gpu -k 64-plain or plain-64 or step or "
        "log_prob or sampled",
    ),
    "step_1b": Part(
        "KTO step of Llama-3.2-1B in full: packed rows of 4,096, 64 examples",
        75,
        140,
        f"{_STEP} --architecture={LLAMA} {_ROWS} --batch=64 --rows=4 --remat=dots",
        f"{_TOY_STEP} --lengths 128 --per-row=4 --batch=16 --rows=2 --remat=dots",
    ),
    "trl": Part(
        "KTO beside TRL 1.16, with and without Liger: Llama-3.2-1B, 32 examples of log-normal length",
        180,
        260,
        f"benchmarks.kto --here --model={LLAMA} --dtype=bfloat16 --sets random --rounds=2 --steps=3 "
        "--contenders kto_jax trl trl_liger --out=OUT",
        "benchmarks.kto --here --model=configs/tiny_model --sets small_random --rounds=1 --steps=1 "
        "--contenders kto_jax trl --out=OUT",
    ),
    "memory_262k": Part(
        "peak memory of Gemma-3-1B (262k vocabulary) at 2 x 8,192 tokens; TRL: 11.98 GiB",
        90,
        160,
        f"{_STEP} --architecture=configs/architectures/gemma_3_1b --kept=bfloat16 --lengths 8192",
        f"{_TOY_STEP} --kept=bfloat16 --lengths 256",
        79,
    ),
    "head": Part(
        "Liger's head shape: batch 32, length 512, width 1,024, vocabulary 128,256; Liger: 3,433 MB, 63.0 ms",
        25,
        60,
        "benchmarks.head --batch=32 --length=512 --width=1024 --vocabulary=128256 --dtype=bfloat16 --out=OUT",
        "benchmarks.head --batch=2 --length=32 --width=64 --vocabulary=1000 --repeats=1 --out=OUT",
    ),
    "decode": Part(
        "decoding of Llama-3.2-1B in bfloat16: 128 tokens after 128, beside transformers",
        80,
        130,
        f"benchmarks.decode --architecture={LLAMA} --dtype=bfloat16 --batches 1 16 64 --prompt=128 --new-tokens=128 "
        "--rounds=1 --out=OUT",
        "benchmarks.decode --batches 1 4 --prompt=8 --new-tokens=8 --rounds=1 --repeats=1 --out=OUT",
    ),
    "step_8b": Part(
        "KTO step of Llama-3.1-8B, weights and moments in bfloat16: packed rows of 4,096, 32 examples",
        85,
        150,
        f"{_STEP} --architecture=configs/architectures/llama_3_1_8b {_ROWS} --kept=bfloat16 --batch=32 --rows=2",
        f"{_TOY_STEP} --kept=bfloat16 --lengths 128 --per-row=4 --batch=8",
    ),
    "step_3b": Part(
        "KTO step of Llama-3.2-3B in full: packed rows of 4,096, 32 examples",
        80,
        150,
        f"{_STEP} --architecture=configs/architectures/llama_3_2_3b {_ROWS} --batch=32 --rows=2",
        f"{_TOY_STEP} --lengths 128 --per-row=4 --batch=8",
    ),
    "longest_262k": Part(
        "the longest sequences of Gemma-3-1B in 79 GiB, batch 2; TRL: 63,488 tokens",
        150,
        240,
        f"{_STEP} --architecture=configs/architectures/gemma_3_1b --kept=bfloat16 --steps=1 --lengths 63488 126976",
        f"{_TOY_STEP} --kept=bfloat16 --lengths 256 512",
        79,
    ),
}


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget", type=float, default=530, help="seconds of all parts together")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = read(options.out)
    deadline = time.monotonic() + options.budget
    for name in options.parts:
        part, left = PARTS[name], deadline - time.monotonic()
        if results["parts"].get(name, {}).get("status") == "done":
            print(f"{name}: figures are there already")
        elif left < 0.7 * part.expected and not options.rehearse:
            print(f"{name}: not started, because {left:.0f} s are left and it takes about {part.expected} s")
        else:
            print(f"{name}: {part.title}", flush=True)
            results["parts"][name] = take(name, part, options, min(part.limit, max(left, 1)))
            write(options.out, results)
            print(f"  {results['parts'][name]['status']}, {results['parts'][name]['seconds']:.0f} s", flush=True)
    print((options.out / "gpu.md").read_text())


def read(out: Path) -> dict[str, Any]:
    """The results so far, with this machine's description if there are none."""
    path = out / "gpu.json"
    if path.exists():
        return json.loads(path.read_text())
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "tokamax", "trl", "liger-kernel")
    return {"card": _card(), "python": platform.python_version(), "packages": _versions(packages), "parts": {}}


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # PackageNotFoundError is one.
            found[name] = "not installed"
    return found


def _card() -> dict[str, Any]:
    """Name, driver and MiB of the first GPU; empty if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        name, driver, mebibytes = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(", ")[
            :3
        ]
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}
    return {"name": name, "driver": driver, "mebibytes": int(mebibytes.split()[0])}


def take(name: str, part: Part, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Runs one part.

    Returns:
      status ("done", "failed: ..." or "reached its limit"), seconds, and figures: what the part wrote, if anything.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.json"
        command = [sys.executable, "-m", *_arguments(part.toy if options.rehearse else part.command, file)]
        start = time.perf_counter()
        with (options.out / "gpu.log").open("a") as log:
            log.write(f"\n===== {name}: {' '.join(command)}\n")
            log.flush()
            # A group of its own, so that the limit also ends the processes that it started.
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(part, options.rehearse, file), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else f"failed: exit code {code}, see gpu.log"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = f"reached its limit of {limit:.0f} s"
        seconds = time.perf_counter() - start
        figures = _figures(file)
    if status == "done" and figures is None:
        status = "failed: it wrote no figures, see gpu.log"
    if status == "done" and (missing := _missing(figures)):
        status = f"failed: {', '.join(missing)}"
    return {"status": status, "seconds": seconds, "expected": part.expected, "title": part.title, "figures": figures}


def _arguments(command: str, file: Path) -> list[str]:
    words = command.replace("OUT", str(file)).split()
    if " -k " in command:  # The expression of -k is one argument.
        place = words.index("-k")
        words = [*words[: place + 1], " ".join(words[place + 1 :])]
    return words


def _environment(part: Part, rehearse: bool, file: Path) -> dict[str, str]:
    share = min(0.95, part.gib * 1024 / _card().get("mebibytes", 10**9)) if part.gib and not rehearse else 0.95
    return os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.4f}",
        # The parts share compiled programs.
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", "/tmp/kto_jax_compiled"),
        "KTO_JAX_FIGURES": str(file),
        **({"JAX_PLATFORMS": "cpu"} if rehearse else {"KTO_JAX_TESTS_ON": "gpu"}),
    }


def _figures(file: Path) -> Any:
    """What a part wrote: JSON, or a line of JSON for each figure."""
    if not file.exists():
        return None
    text = file.read_text()
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def _missing(figures: Any) -> list[str]:
    """Contenders of benchmarks.kto that failed."""
    sets = figures.values() if isinstance(figures, dict) else ()
    return [name for one in sets if isinstance(one, dict) for name in one.get("failed", ())]


def write(out: Path, results: dict[str, Any]) -> None:
    """Writes gpu.json, whole or not at all, and gpu.md."""
    partial = out / "gpu.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out / "gpu.json")
    lines = [f"{results['card'].get('name', 'no GPU: a rehearsal')}, {results['packages']}", ""]
    lines += ["| part | status | seconds (expected) | figures |", "|---|---|---|---|"]
    for name in (name for name in PARTS if name in results["parts"]):
        part = results["parts"][name]
        try:
            text = SUMMARIES[name.split("_")[0]](part["figures"]) if part["figures"] else ""
        except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            text = f"incomplete: {error!r}"
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} ({part['expected']}) | {text} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


def _of_correctness(lines: list[dict[str, Any]]) -> str:
    texts = []
    for dtype in sorted({one["dtype"] for one in lines}):
        of_dtype = [one for one in lines if one["dtype"] == dtype]
        worst = max(of_dtype, key=lambda one: one["difference"])
        texts.append(f"{dtype}: {len(of_dtype)} comparisons, at most {worst['difference']:.1e} ({worst['name']})")
    return "; ".join(texts)


def _of_steps(figures: dict[str, Any]) -> str:
    texts = []
    for one in figures["results"]:
        seconds = min(one["seconds"])
        mfu = one["flops"] / seconds / one["peak_flops"]
        texts.append(
            f"{one['length']:,} tokens: {one['tokens'] / seconds:,.0f} tokens/s, MFU {mfu:.1%} of the "
            f"{one['peak_source']} peak, {one['peak_bytes'] / GIB:.2f} GiB, {one['attention']} attention, compiled in "
            f"{one['compile_seconds']:.0f} s"
        )
    return "; ".join(texts)


def _of_trl(figures: dict[str, Any]) -> str:
    result = figures.get("random") or figures["small_random"]
    texts = [
        f"{name}: {one['tokens_per_second']:,.0f} tokens/s, {one['peak_bytes'] / GIB:.1f} GiB, kto_jax by it "
        f"{one['ratio']:.2f}"
        for name, one in result["summary"].items()
    ]
    return "; ".join(texts + [f"{name} failed: {why}" for name, why in result["failed"].items()])


def _of_head(figures: dict[str, Any]) -> str:
    texts = []
    for shape in figures.values():
        for name, one in shape["contenders"].items():
            text = one.get("error") or f"{one['milliseconds']:.1f} ms, {one['megabytes']:,.0f} MB"
            texts.append(f"{name}: {text}")
    return "; ".join(texts)


def _of_decoding(figures: dict[str, Any]) -> str:
    return "; ".join(
        f"batch {size}: " + ", ".join(f"{name} {rate:,.2f}" for name, rate in rates.items())
        for size, rates in figures["summary"].items()
    )


SUMMARIES: dict[str, Callable[[Any], str]] = {
    "correctness": _of_correctness,
    "step": _of_steps,
    "memory": _of_steps,
    "longest": _of_steps,
    "trl": _of_trl,
    "head": _of_head,
    "decode": _of_decoding,
}


if __name__ == "__main__":
    main()
