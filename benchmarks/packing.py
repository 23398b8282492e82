"""Share of padding in the model's input: packed rows, and rows padded to the longest of the batch.

    python -m benchmarks.packing

Three sets of lengths: the quickstart's reviews; the second speaker's last turn, after the conversation, of 5,988 rated
conversations (chitchat-dataset 0.9.0, MIT, fetched as a wheel; about 8 MB); log-normal lengths with median 250, 95th
percentile 1,000 and cap 2,048. Padding is counted in the non-empty microbatches, matched and unmatched, as in the
training step. No model runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from configs import quickstart
from kto_jax.config import resolve
from kto_jax.data.batches.packing import RowLimits, choose_row_lengths
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index.index import Index
from kto_jax.data.truncation import fit_lengths
from kto_jax.inspect import read_feedback
from kto_jax.storage.fetch import local_path

CHITCHAT = "wheel:chitchat-dataset==0.9.0/chitchat_dataset/dataset.json"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A set's tokens [rows], and its training settings."""

    name: str
    prompt: np.ndarray
    completion: np.ndarray
    max_length: int
    settings: tuple[tuple[int, int], ...]
    """Batch size and rows per microbatch, of each line of the table."""


def quickstart_lengths() -> Lengths:
    """The rows that the quickstart trains on."""
    config = resolve(quickstart.get_config())
    with tempfile.TemporaryDirectory() as scratch:
        index, _ = read_feedback(config, Path(scratch))
    train = index.sequences("train")
    settings = ((config.batch_size, 1), (config.batch_size, int(config.microbatch_rows)), (32, 1), (256, 1), (256, 8))
    return Lengths("quickstart", index.prompt_lengths[train], index.completion_lengths[train], 128, settings)


def chitchat_lengths() -> Lengths:
    """Rated conversations, as the quickstart's tokenizer writes them: a chat of turns, of which the last is rated."""
    import tokenizers

    from kto_jax.data.tokens.prepare import prepare_tokenizer

    config = resolve(quickstart.get_config())
    with tempfile.TemporaryDirectory() as scratch:
        info = prepare_tokenizer(local_path(config.model.path), Path(scratch) / "tokenizer", chat_template="none")
        backend = tokenizers.Tokenizer.from_file(str(info.directory / "tokenizer.json"))
    prompts, completions = [], []
    for conversation in json.loads(local_path(CHITCHAT).read_bytes()).values():
        turns = ["\n".join(message["text"] for message in turn) for turn in conversation["messages"]]
        # The last turn of the second speaker, who is rated as the assistant.
        last = len(turns) - 1 - len(turns) % 2
        if "ratings" in conversation and last >= 1 and turns[last].strip():
            written = [
                f"<|im_start|>{('user', 'assistant')[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)
            ]
            prompts.append("".join(written[:last]) + "<|im_start|>assistant\n")
            completions.append(turns[last] + "<|im_end|>")
    num_prompt, num_completion = (
        np.array([len(encoding.ids) for encoding in backend.encode_batch(texts, add_special_tokens=False)])
        for texts in (prompts, completions)
    )
    return Lengths("chitchat-dataset", num_prompt, num_completion, 2048, ((32, 1), (32, 8), (256, 1), (256, 8)))


def log_normal_lengths(count: int = 40_000) -> Lengths:
    """Median 250, 95th percentile 1,000, cap 2,048; a third of each row is completion."""
    draws = np.random.default_rng(0).standard_normal(count)
    total = np.clip(np.exp(math.log(250) + math.log(4) / 1.645 * draws).astype(np.int64), 3, 2048)
    completion = np.maximum(total // 3, 1)
    return Lengths("log-normal", total - completion, completion, 2048, ((32, 1), (32, 8), (256, 1), (256, 8)))


def make_index(lengths: Lengths) -> Index:
    """An index with lengths but no text."""
    count = len(lengths.prompt)
    offsets = np.concatenate([[0], np.cumsum(lengths.prompt + lengths.completion)]).astype(np.int64)
    zeros = np.zeros(count, np.float32)
    return Index(
        directory=Path("none"),
        manifest={"data": {"max_prompt_length": lengths.max_length // 2}, "tokenizer": {"bos_id": None}},
        tokens=np.zeros(offsets[-1], np.int32),
        offsets=offsets,
        prompt_lengths=np.asarray(lengths.prompt, np.int32),
        desirable=np.arange(count) % 2 == 0,
        weights=zeros,
        scores=zeros,
        rejected=np.full(count, -1, np.int64),
        prompt_hashes=np.arange(count, dtype=np.uint64),
        splits=np.zeros(count, np.uint8),
        places=np.zeros((count, 2), np.int64),
    )


def measure(schedule: Schedule, num_steps: int, index: Index, lengths: Lengths) -> dict[str, float]:
    """Padding shares over some steps, and milliseconds to make a batch."""
    real = room = longest = matched = 0
    seconds, shapes = 0.0, set()
    steps = range(min(num_steps, schedule.steps_per_epoch))
    for s in steps:
        start = time.perf_counter()
        batch = schedule.batch(s)
        seconds += time.perf_counter() - start
        matched += int((batch.matched.segment_ids > 0).sum())
        shapes.add(batch.matched.tokens.shape)
        for packed, count in ((batch.matched, batch.num_matched), (batch.unmatched, batch.num_unmatched)):
            real += int((packed.segment_ids > 0).sum())
            room += packed.segment_ids[:count].size
        step = schedule.step(s)
        for prompts, completions in ((step.ids, step.ids), (step.ids, step.partners)):
            totals = sum(
                fit_lengths(
                    index.prompt_lengths[prompts],
                    index.completion_lengths[completions],
                    max_length=lengths.max_length,
                    max_prompt_length=lengths.max_length // 2,
                )
            )
            longest += len(totals) * int(np.max(totals))
    return {
        "steps": len(steps),
        "tokens_per_step": matched / len(steps),
        "padding": 1 - real / room,
        "padding_to_longest": 1 - real / longest,
        "fewer_tokens": longest / room,
        "programs": len(shapes),
        "milliseconds_per_batch": 1e3 * seconds / len(steps),
    }


def main() -> None:
    """Prints the table and writes it to benchmarks/results/packing.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sets", nargs="+", default=["quickstart", "chitchat", "log_normal"])
    parser.add_argument("--out", default="benchmarks/results/packing.json")
    options = parser.parse_args()
    columns = ("set", "batch", "R", "L", "real tokens a step", "padding", "padded to longest", "tokens saved", "ms")
    table, results = Table(*columns), []
    for name in options.sets:
        lengths = globals()[f"{name}_lengths"]()
        index = make_index(lengths)
        kept = fit_lengths(
            lengths.prompt,
            lengths.completion,
            max_length=lengths.max_length,
            max_prompt_length=lengths.max_length // 2,
        )
        for batch_size, rows in lengths.settings:
            size = {"batch_size": batch_size, "microbatch_rows": rows}
            chosen = [choose_row_lengths(*kept, shortest=lengths.max_length, num_lengths=n, **size) for n in (1, 2)]
            for row_length in dict.fromkeys([(lengths.max_length,), *chosen]):
                limits = RowLimits(row_length, row_length[0], rows, lengths.max_length)
                schedule = Schedule(index, np.arange(len(lengths.prompt)), Order(batch_size, seed=0), limits)
                figures = measure(schedule, options.steps, index, lengths)
                results.append({"set": lengths.name, **size, "row_length": row_length, **figures})
                table.add_row(
                    lengths.name,
                    str(batch_size),
                    str(rows),
                    ", ".join(map(str, row_length)),
                    f"{figures['tokens_per_step']:,.0f}",
                    f"{figures['padding']:.1%}",
                    f"{figures['padding_to_longest']:.1%}",
                    f"{figures['fewer_tokens']:.2f}×",
                    f"{figures['milliseconds_per_batch']:.1f}",
                )
    Console().print(table)
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
