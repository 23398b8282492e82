"""A reward model on top of Llama-3.1-8B-Instruct, from pairs, after Bradley and Terry.

    python -m kto_jax.train --config=configs/reward_llama.py --config.data.train=pairs.jsonl --workdir=runs/reward

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ...,
"chosen": ..., "rejected": ...}.

Expect: the loss starts near ln 2 = 0.693, accuracy near 0.5. transformers loads policy/ as
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
