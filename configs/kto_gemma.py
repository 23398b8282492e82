"""KTO of Gemma-2-9B-it on thumbs of your own, on a v5e:4x8 slice: 32 chips of 16 GiB.

    python -m kto_jax.train --config=configs/kto_gemma.py --config.data.train=feedback.jsonl --workdir=runs/gemma

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 166 GB plus activations, sharded by fsdp over the chips;
docs/scale.md has the plan. Gemma 3 text models use the same settings (`--config.model.path=google/gemma-3-1b-it`). Rows
are as in configs/kto_llama.py; Gemma 2's template has no system role. Completions end as its turns do, with
<end_of_turn>; generation also stops at <eos>.

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. kl may be negative; z0 is
then 0. If `saturated` approaches 1, the run has little left to learn or the learning rate is too high.
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
