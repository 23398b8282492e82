"""KTO of Qwen3-8B on thumbs of your own, on a v5p:2x2x2 slice: 8 chips of 95 GiB.

    python -m kto_jax.train --config=configs/kto_qwen.py --config.data.train=feedback.jsonl --workdir=runs/qwen

Hardware: policy, AdamW and the accumulated gradient take 16 bytes per parameter in float32, and the reference 2 in
bfloat16, the dtype of the published files. That is 147 GB plus activations, sharded by fsdp over the chips;
docs/scale.md has the plan. Qwen2.5-7B-Instruct uses the same settings (`--config.model.path=Qwen/Qwen2.5-7B-Instruct`).
Rows are as in configs/kto_llama.py.
Qwen3 is trained without thinking: its prompts end in an empty thought, as its template writes them with thinking off.

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. kl may be negative; z0 is
then 0. If `saturated` approaches 1, the run has little left to learn or the learning rate is too high.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.model.path = "Qwen/Qwen3-8B"
    config.data.train = "feedback.jsonl"
    config.batch_size = 128
    config.microbatch_rows = 8
    config.objective.beta = 0.1
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 150
    return config
