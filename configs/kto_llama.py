"""KTO of Llama-3.1-8B-Instruct on thumbs of your own: the recipe of the paper.

    python -m kto_jax.train --config=configs/kto_llama.py --config.data.train=feedback.jsonl --workdir=runs/llama

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
feedback.jsonl holds rows of {"prompt": ..., "completion": ..., "label": true or false}; pairs also work (data.format
"pairs").

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. kl may be negative; z0 is
then 0. If `saturated` approaches 1, the run has little left to learn or the learning rate is too high.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.objective.beta = 0.1
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
