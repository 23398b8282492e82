"""A random 2-layer model on 240 toy rows: takes seconds, for tests and first experiments.

    python -m kto_jax.train --config=configs/tiny.py

Any machine. Expect the margin between desirable and undesirable rewards to rise above 1 and the AUC to reach 1.
"""

from pathlib import Path

from kto_jax.config import default_config

HERE = Path(__file__).parent


def get_config():
    config = default_config()
    config.model.path = str(HERE / "tiny_model")
    config.model.init = "random"
    config.model.dtype = "float32"
    config.data.train = str(HERE / "tiny_feedback.jsonl")
    config.data.max_length = 64
    config.data.max_prompt_length = 48
    config.data.holdout = 0.1
    config.data.num_workers = 1
    config.batch_size = 16
    config.epochs = 3
    config.microbatch_rows = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5
    config.evaluation.every = 10
    config.checkpoint.every = 10
    return config
