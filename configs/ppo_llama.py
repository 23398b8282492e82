"""PPO of Llama-3.1-8B-Instruct on prompts with a reward: RLHF with a value head on the policy's trunk.

    python -m kto_jax.online --config=configs/ppo_llama.py --config.data.train=prompts.jsonl \\
        --reward=rewards.py:correct --prompts_per_round=512 --num_samples=1 \\
        --max_new_tokens=1024 --rounds=100 --batch_size=128 --workdir=runs/ppo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, 129 GB plus activations,
sharded by fsdp over the chips of one host; no reference is held. Not run: no accelerator was available.
prompts.jsonl holds rows of {"prompt": ...}; every other column is handed to the reward (docs/online.md).

Expect: `explained_variance` is 0 in the first round and rises; the mean reward of the rounds follows. The first 16
updates train only the value head.
"""

from kto_jax.config import online_config


def get_config():
    config = online_config()
    config.objective.name = "ppo"
    config.objective.kl_weight = 0.05
    config.objective.value_warmup = 16
    config.epochs = 2
    return config
