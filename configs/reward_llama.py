"""A reward model on top of Llama-3.1-8B-Instruct, from pairs, after Bradley and Terry.

    python -m kto_jax.train --config=configs/reward_llama.py --config.data.train=pairs.jsonl --workdir=runs/reward

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, no reference is held: 128 GB
and activations, spread by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ..., "chosen": ...,
"rejected": ...}.

Expect: the loss starts near ln 2 = 0.693, accuracy near 0.5. policy/ opens in transformers as
LlamaForSequenceClassification; `python -m kto_jax.score --model=runs/reward --data=... --out=scored.jsonl` scores
rows, which data.format "scores" reads back.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "reward"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.centring = 0.01
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    return config
