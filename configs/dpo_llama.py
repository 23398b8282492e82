"""DPO of Llama-3.1-8B-Instruct on pairs: the loss that most others are compared with.

    python -m kto_jax.train --config=configs/dpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/dpo

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
pairs.jsonl holds rows of {"prompt": ..., "chosen": ..., "rejected": ...}; thumbs also make pairs, if a prompt has both
labels (data.format "thumbs").

Expect: the loss starts at ln 2 = 0.693 and the margin at 0, because the policy starts as the reference. The learning
rate is a tenth of KTO's, as in the papers. Variants: --config.objective.variant=ipo, and so on (docs/objectives.md).
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "dpo"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.beta = 0.1
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_steps = 150
    return config
