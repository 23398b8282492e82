"""DPO of Llama-3.1-8B-Instruct on pairs: the loss that most others are measured against.

    python -m kto_jax.train --config=configs/dpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/dpo

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16:
145 GB and activations, spread by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ..., "chosen":
..., "rejected": ...}; thumbs make pairs too, where a prompt has both labels (data.format "thumbs").

Expect: the loss starts at ln 2 = 0.693 and the margin at 0, since the policy starts as the reference. A learning rate
of a tenth of KTO's, as the papers take. Variants: --config.objective.variant=ipo, and so on (docs/objectives.md).
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
