"""Online KTO of Llama-3.1-8B-Instruct on prompts with a reward: thumbs by the mean reward of the round.

    python -m kto_jax.online --config=configs/online_kto_llama.py --config.data.train=prompts.jsonl \\
        --reward=rewards.py:correct --prompts_per_round=256 --num_samples=4 \\
        --max_new_tokens=1024 --rounds=20 --batch_size=128 --label=mean --workdir=runs/online_kto

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16. That is 145 GB plus activations, sharded by fsdp over the chips of one host. Not run: no accelerator was
available.
prompts.jsonl holds rows of {"prompt": ...}; every other column is handed to the reward (docs/online.md).

Expect: the mean reward of the rounds rises. z0 leaves 0, because the policy wrote the completions itself.
"""

from kto_jax.config import online_config


def get_config():
    config = online_config()
    config.objective.beta = 0.1
    config.optimizer.warmup_steps = 2
    return config
