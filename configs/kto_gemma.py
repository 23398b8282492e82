"""KTO of Gemma-2-9B-it on thumbs of your own, on a v5e:4x8 slice: 32 chips of 16 GiB.

    python -m kto_jax.train --config=configs/kto_gemma.py --config.data.train=feedback.jsonl --workdir=runs/gemma

Hardware: policy, AdamW and the sum of gradients take 16 bytes a parameter in float32, the reference 2 in bfloat16: 166
GB and activations, spread by fsdp over the chips; docs/scale.md has the plan. Gemma 3 takes the same settings where it
is a text model (`--config.model.path=google/gemma-3-1b-it`). Rows are as in configs/kto_llama.py; Gemma 2's template
knows no system role. Completions end as its turns do, in <end_of_turn>, and generation stops at <eos> too.

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. kl may be negative, then z0
is 0. Where `saturated` nears 1, the run has little left to learn or the learning rate is too high.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.model.path = "google/gemma-2-9b-it"
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.microbatch_rows = 32
    config.objective.beta = 0.1
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
