"""CPO of Llama-3.1-8B-Instruct on pairs: DPO without a reference, held up by likelihood.

    python -m kto_jax.train --config=configs/cpo_llama.py --config.data.train=pairs.jsonl --workdir=runs/cpo

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, no reference is held: 128 GB
and activations, spread by fsdp over the chips of one host. pairs.jsonl holds rows of {"prompt": ..., "chosen": ...,
"rejected": ...}; thumbs make pairs too, where a prompt has both labels (data.format "thumbs").

Expect: the loss holds the likelihood loss of the chosen completions, a mean over tokens, beside the preference. The
margin grows with the length of completions, since their log-probabilities are sums.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.objective.name = "cpo"
    config.data.train = "pairs.jsonl"
    config.data.format = "pairs"
    config.batch_size = 64
    config.objective.beta = 0.1
    config.objective.nll_weight = 1.0
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    return config
