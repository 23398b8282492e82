"""RLOO of Llama-3.1-8B-Instruct on prompts with a reward: each completion against the others of its prompt.

    python -m kto_jax.online --config=configs/rloo_llama.py --config.data.train=prompts.jsonl \\
        --reward=rewards.py:correct --prompts_per_round=128 --num_samples=4 \\
        --max_new_tokens=1024 --rounds=100 --batch_size=128 --workdir=runs/rloo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, 129 GB plus activations,
sharded by fsdp over the chips of one host; no reference is held. Not run: no accelerator was available.
prompts.jsonl holds rows of {"prompt": ...}; every other column is handed to the reward (docs/online.md).

Expect: the mean reward of the rounds rises. The KL to the initial model is subtracted from the rewards, as in
arXiv 2402.14740.
"""

from kto_jax.config import online_config


def get_config():
    config = online_config()
    config.objective.name = "grpo"
    config.objective.old_logps = "sampled"
    config.objective.variant = "rloo"
    config.objective.length_scale = 1024.0
    config.objective.kl_in = "reward"
    config.objective.kl_estimator = "k1"
    config.objective.kl_weight = 0.05
    return config
