"""TRL's GRPOTrainer with transformers' generate, on the prompts of all contenders.

Runs in its own environment, which has torch and TRL but not kto_jax.
"""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.peers.short_answer import short
from benchmarks.peers.trl import Clock
from benchmarks.peers.turn import read_job, report


class Trainer(trl.GRPOTrainer):
    """The trainer; keeps the mean reward and length of each step."""

    def log(self, logs: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """TRL's log, whose figures are kept besides."""
        sums = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        if sums and "loss" in logs:
            self.figures.append(sums)
        super().log(logs, *arguments, **keywords)


def make_trainer(job: dict[str, Any], directory: str, clock: Clock) -> Trainer:
    """A trainer with TRL's defaults, except for the settings that all contenders share."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [tokenizer.decode(ids) for round_ in job["prompts"] for ids in round_]
    encoded = tokenizer(text=prompts)["input_ids"]
    assert encoded == [ids for round_ in job["prompts"] for ids in round_], "other tokens than kto_jax's"
    arguments = trl.GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=job["completions"] // job["microbatch"],
        max_steps=len(job["prompts"]),
        num_generations=job["num_samples"],
        max_completion_length=job["max_new_tokens"],
        shuffle_dataset=False,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=job["learning_rate"],
        adam_beta2=job["b2"],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["clip_norm"],
        lr_scheduler_type="constant",
        bf16=job["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=short,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.figures = []
    return trainer


def main() -> None:
    """Runs the job."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(job, directory, clock)
        trainer.train()
    report(
        job,
        seconds=clock.seconds,
        rewards=[float(step["reward"]) for step in trainer.figures],
        lengths=[float(step["completions/mean_length"]) for step in trainer.figures],
        versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    main()
