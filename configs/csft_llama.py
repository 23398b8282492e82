"""SFT of Llama-3.1-8B-Instruct on thumbs of both kinds, each after a control text for its label.

    python -m kto_jax.train --config=configs/csft_llama.py --config.data.train=feedback.jsonl --workdir=runs/csft

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32; there is no reference. That
is 128 GB plus activations, sharded by fsdp over the chips of one host. feedback.jsonl holds rows of {"prompt": ...,
"completion": ..., "label": true or false}.

Expect: sample after the good control: prompts then end in `<|good|>`, which is plain text and needs no new token.
eval_loss is the loss of held-out desirable completions after it; eval_margin says how much likelier they are than
undesirable ones.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "csft"
    config.data.train = "feedback.jsonl"
    config.batch_size = 64
    config.objective.good_control = "<|good|>"
    config.objective.bad_control = "<|bad|>"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.epochs = 2
    return config
