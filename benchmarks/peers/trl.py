"""TRL's KTOTrainer in its own training loop, on the same tokens as all contenders.

Runs in its own environment, which has torch and TRL but not kto_jax.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.peers.turn import read_job, report


class Trainer(trl.KTOTrainer):
    """The trainer, with tokens instead of text; records the losses."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        """TRL's loss."""
        loss = super().compute_loss(*arguments, **keywords)
        self.losses.append(loss.detach())
        return loss


class Clock(transformers.TrainerCallback):
    """Seconds from a step's ready batch to the optimizer's update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def collate(pad: Any, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """TRL's own padding of matched and of unmatched rows, which are already truncated."""
    fields = ("prompt_ids", "completion_ids", "label")
    matched = pad([{name: example[name] for name in fields} for example in examples])
    unmatched = pad([{name: example[f"KL_{name}"] for name in fields[:2]} | {"label": True} for example in examples])
    return matched | {f"KL_{name}": value for name, value in unmatched.items() if name != "label"}


def make_dataset(job: dict[str, Any]) -> datasets.Dataset:
    """The examples of all batches, in order."""
    examples = []
    for rows in job["rows"]:
        for matched, unmatched, label in zip(rows["matched"], rows["unmatched"], rows["desirable"], strict=True):
            named = {"prompt_ids": matched[0], "completion_ids": matched[1]}
            named |= {"KL_prompt_ids": unmatched[0], "KL_completion_ids": unmatched[1]}
            examples.append(named | {"label": label})
    return datasets.Dataset.from_list(examples)


def make_trainer(job: dict[str, Any], directory: str, clock: Clock) -> Trainer:
    """A trainer with TRL's defaults, except for the settings that all contenders share."""
    options, settings = job["config"]["objective"], job["config"]["optimizer"]
    arguments = trl.KTOConfig(
        output_dir=directory,
        per_device_train_batch_size=len(job["rows"][0]["desirable"]),
        max_steps=len(job["rows"]),
        max_length=job["max_length"],
        beta=options["beta"],
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
        learning_rate=settings["learning_rate"],
        adam_beta2=settings["b2"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_norm"],
        lr_scheduler_type="constant",
        bf16=job["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        use_liger_kernel=job.get("liger", False),
        gradient_checkpointing=job["gradient_checkpointing"],
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2)
    )
    trainer = Trainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=make_dataset(job),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.losses = []
    pad = trainer.data_collator
    trainer.data_collator = lambda examples: collate(pad, examples)
    return trainer


def main() -> None:
    """Runs the job."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(job, directory, clock)
        trainer.train()
    expected = sum(len(prompt) + len(completion) for rows in job["rows"] for prompt, completion in rows["matched"])
    assert trainer._total_train_tokens == expected, (trainer._total_train_tokens, expected)
    report(
        job,
        seconds=clock.seconds,
        losses=[float(loss) for loss in trainer.losses],
        device_peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main()
