"""Online DPO of Llama-3.1-8B-Instruct on prompts with a reward: the best and the worst of four completions.

    python -m kto_jax.online --config=configs/online_dpo_llama.py --config.data.train=prompts.jsonl \\
        --reward=rewards.py:correct --prompts_per_round=512 --num_samples=4 \\
        --max_new_tokens=1024 --rounds=20 --batch_size=128 --workdir=runs/online_dpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16. That is 145 GB plus activations, sharded by fsdp over the chips of one host. Not run: no accelerator was
available.
prompts.jsonl holds rows of {"prompt": ...}; every other column is handed to the reward (docs/online.md).

Expect: the loss starts every round near ln 2 = 0.693, and the mean reward of the rounds rises.
"""

from kto_jax.config import online_config


def get_config():
    config = online_config()
    config.objective.name = "dpo"
    config.objective.beta = 0.1
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_steps = 2
    return config
