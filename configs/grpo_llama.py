"""GRPO of Llama-3.1-8B-Instruct on prompts with a reward: Dr. GRPO's loss, with a KL to the initial model.

    python -m kto_jax.online --config=configs/grpo_llama.py --config.data.train=prompts.jsonl \\
        --reward=rewards.py:correct --prompts_per_round=64 --num_samples=8 \\
        --max_new_tokens=1024 --rounds=100 --batch_size=128 --workdir=runs/grpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, 129 GB plus activations,
sharded by fsdp over the chips of one host; no reference is held. Not run: no accelerator was available.
prompts.jsonl holds rows of {"prompt": ...}; every other column is handed to the reward (docs/online.md).

Expect: the mean reward of the rounds rises, and `no_spread` stays well below 1. `clipped` is 0 at the first of a
round's four updates. Other variants: --config.objective.variant=dapo, and so on.
"""

from kto_jax.config import online_config


def get_config():
    config = online_config()
    config.objective.name = "grpo"
    config.objective.old_logps = "sampled"
    config.objective.variant = "dr_grpo"
    config.objective.length_scale = 1024.0
    config.objective.kl_weight = 0.01
    return config
