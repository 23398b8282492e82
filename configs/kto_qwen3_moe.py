"""KTO with adapters of Qwen3-30B-A3B, a mixture of experts, on a v5p:2x2x2 slice: 8 chips of 95 GiB.

    python -m kto_jax.train --config=configs/kto_qwen3_moe.py --config.data.train=feedback.jsonl --workdir=runs/moe

Hardware: the frozen weights take 61 GB in bfloat16. Each chip has 16 of the 128 experts of a layer (`mesh.expert`) and
an eighth of everything else, 7.6 GB. The adapters are on attention alone, 1 MB for each layer;
those of all experts (`--config.lora.targets=query,key,value,output,gate,up,down`) are 62 times as many. Mixtral has 8
experts, one for each chip, and uses the same settings (`--config.model.path=mistralai/Mixtral-8x7B-Instruct-v0.1`).
Routers are frozen, so `router.balance_weight` is 0 unless it is set.

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. `expert_max_load` says how
much more the busiest expert has to do than the mean one; with frozen routers it should hardly move.
"""

from kto_jax.config import one_host_config


def get_config():
    config = one_host_config()
    config.model.path = "Qwen/Qwen3-30B-A3B"
    config.data.train = "feedback.jsonl"
    config.mesh.data = 1
    config.mesh.fsdp = 1
    config.mesh.expert = -1
    config.batch_size = 128
    config.microbatch_rows = 8
    config.lora.rank = 16
    config.lora.targets = ("query", "key", "value", "output")
    config.objective.beta = 0.1
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 150
    return config
