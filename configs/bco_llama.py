"""BCO of Llama-3.1-8B-Instruct on thumbs: a classifier of completions, with rewards centred by their mean.

    python -m kto_jax.train --config=configs/bco_llama.py --config.data.train=feedback.jsonl --workdir=runs/bco

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 145 GB plus activations, sharded by fsdp over the chips of one host.
feedback.jsonl holds rows of {"prompt": ..., "completion": ..., "label": true or false}; pairs also work, one completion
at a time (data.format "pairs").

Expect: the loss starts at ln 2 = 0.693 and the margin at 0. running_mean is the mean reward of all earlier steps; there
is no pass over unrelated completions, so a step costs two thirds of KTO's.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "bco"
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.objective.beta = 0.1
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
