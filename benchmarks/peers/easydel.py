"""EasyDeL's KTOTrainer in its own training loop, on the same tokens as all contenders.

Runs in its own environment. EasyDeL makes unmatched pairs in the step, by rolling a field that holds prompt and
completion together: they are the matched rows again. It therefore reads as many rows as the others, but its z0 differs.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import datasets
import easydel
import jax
import jax.numpy as jnp
import transformers

from benchmarks.peers.turn import read_job, report


class Trainer(easydel.KTOTrainer):
    """The trainer, which records the seconds and the losses of its steps."""

    def _execute_train_step(self, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        state, metrics, exception = super()._execute_train_step(*arguments, **keywords)
        self.seconds.append(time.perf_counter() - start)
        if exception is not None:
            raise exception
        self.losses.append(float(metrics.loss))
        return state, metrics, exception


def make_dataset(job: dict[str, Any], pad_id: int) -> datasets.Dataset:
    """The matched rows of all batches, in order, padded as EasyDeL's preprocessing pads."""
    length, prompt_length = job["max_length"], job["config"]["data"]["max_prompt_length"]
    examples = []
    for rows in job["rows"]:
        for (prompt, completion), label in zip(rows["matched"], rows["desirable"], strict=True):
            ids, kept = prompt + completion, prompt[-prompt_length:]
            after, before = length - len(ids), prompt_length - len(kept)
            examples.append(
                {
                    "prompt_input_ids": [pad_id] * before + kept,
                    "prompt_attention_mask": [0] * before + [1] * len(kept),
                    "completion_input_ids": ids + [pad_id] * after,
                    "completion_attention_mask": [1] * len(ids) + [0] * after,
                    "completion_labels": [-100] * len(prompt) + completion + [-100] * after,
                    "label": label,
                }
            )
    return datasets.Dataset.from_list(examples)


def make_trainer(job: dict[str, Any], directory: str) -> Trainer:
    """A trainer with EasyDeL's defaults, except for the settings that all contenders share.

    To save memory it processes one row at a time (whose unmatched pair is then the row itself), recomputes every layer
    and splits the vocabulary into chunks.
    """
    options, settings = job["config"]["objective"], job["config"]["optimizer"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = easydel.EasyDeLGradientCheckPointers.NOTHING_SAVEABLE if job["save_memory"] else None
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        job["model"],
        dtype=jnp.dtype(job["dtype"]),
        param_dtype=jnp.float32,
        config_kwargs=policy and easydel.EasyDeLBaseConfigDict(gradient_checkpointing=policy),
        verbose=False,
    )
    max_prompt_length = job["config"]["data"]["max_prompt_length"]
    batch_size = len(job["rows"][0]["desirable"])
    num_parts = batch_size if job["save_memory"] else 1
    arguments = easydel.KTOConfig(
        save_directory=directory,
        total_batch_size=batch_size // num_parts,
        gradient_accumulation_steps=num_parts,
        logprob_vocab_chunk_size=4096 if job["save_memory"] else None,
        num_train_epochs=1,
        max_training_steps=len(job["rows"]),
        max_length=job["max_length"],
        max_prompt_length=max_prompt_length,
        max_completion_length=job["max_length"] - max_prompt_length,
        beta=options["beta"],
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
        learning_rate=settings["learning_rate"],
        scheduler="none",
        weight_decay=settings["weight_decay"],
        clip_grad=settings["clip_norm"],
        shuffle_train_dataset=False,
        do_last_save=False,
        use_wandb=False,
    )
    trainer = Trainer(
        arguments=arguments,
        model=model,
        processing_class=tokenizer,
        train_dataset=make_dataset(job, tokenizer.pad_token_id),
    )
    trainer.seconds, trainer.losses = [], []
    return trainer


def main() -> None:
    """Runs the job."""
    job = read_job()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(job, directory)
        trainer.train()
    assert len(trainer.seconds) == len(job["rows"]), "a step is missing"
    on_device = jax.devices()[0].memory_stats() or {}
    report(
        job,
        seconds=trainer.seconds,
        losses=trainer.losses,
        device_peak_bytes=on_device.get("peak_bytes_in_use"),
        versions={"easydel": easydel.__version__, "jax": jax.__version__},
    )


if __name__ == "__main__":
    main()
