"""GGUF files of every family, read by transformers and by llama.cpp: the same logits and log-probabilities."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from kto_jax.exports.gguf_file import write_gguf
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import TINY_MODEL
from tests.data.tokens.pieces import TEXTS, write_pieces
from tests.exports.gguf_models import GGUF_FILES
from tests.parity.test_families import close
from tests.parity.test_transformers import our_logits, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(5, 500, (1, 24))
LENGTHS = (1, 4, 9, 16, 24)
IN_TRANSFORMERS = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "starcoder2")
APPROXIMATE = ("gemma", "gemma2", "gemma3", "gpt_neox", "gpt_neox_serial", "starcoder2")
"""llama.cpp computes GELU by its tanh approximation, from a table in float16."""


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("xllamacpp")


def write_model(folder, name):
    """A random model as a directory and as a GGUF file."""
    model = Model.create(read_config_json(GGUF_FILES[name] | {"vocab_size": read_config(TINY_MODEL).vocab_size}))
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), "float32")
    # Norms and biases that differ from each other and from what they are initialised to.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), params)
    save_hugging_face(folder / "ours", model, params, tokenizer_dir=TINY_MODEL, model_card="")
    # llama.cpp looks for special tokens of Phi-3 in a file whose name has "phi3" in it.
    write_gguf(folder / "model.gguf", folder / "ours", "f32", name="tiny")
    return model, params, folder / "model.gguf"


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_computes_the_same_from_a_gguf_file(torch, transformers, name, tmp_path):
    model, params, file = write_model(tmp_path, name)
    # transformers reads no size of heads, scaling or soft-cap from a GGUF file.
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    close(our_logits(model, params, TOKENS), their_logits(torch, theirs, TOKENS))


def their_logps(llama_cpp, file, prompts, vocab_size):
    """llama.cpp's log-probabilities of the next token, after each of these texts or lists of ids."""
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(file), 256, False
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(settings)
    rows = np.full((len(prompts), vocab_size), np.nan)
    for row, prompt in zip(rows, prompts, strict=True):
        request = {"prompt": prompt, "max_tokens": 1, "n_probs": vocab_size, "temperature": 0.0}
        # A token that is no whole letter would be answered without its figures.
        answer = server.handle_completions(request | {"logit_bias": [[40, 1000.0]]})
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
    return rows


@pytest.mark.parametrize("name", GGUF_FILES)
def test_llama_cpp_computes_the_same_from_a_gguf_file(llama_cpp, name, tmp_path):
    model, params, file = write_model(tmp_path, name)
    prompts = [TOKENS[0, :length].tolist() for length in LENGTHS]
    theirs = their_logps(llama_cpp, file, prompts, model.config.vocab_size)
    ours = jax.nn.log_softmax(our_logits(model, params, TOKENS)[0])[np.array(LENGTHS) - 1]
    differ = float(np.max(np.abs(theirs - ours)))
    print(f"{name}: log-probabilities differ by at most {differ:.1e}, and spread by {float(np.std(ours)):.2f}")
    assert differ < (5e-3 if name in APPROXIMATE else 1e-4)


@pytest.mark.parametrize("kind", ["pieces", "pieces after a space", "gpt-2", "olmo"])
def test_llama_cpp_splits_text_as_the_tokenizer_does(llama_cpp, kind, tmp_path):
    model, params, _ = write_model(tmp_path, "olmo2")
    folder = tmp_path / "ours"
    if kind.startswith("pieces"):
        write_pieces(folder, prefix=kind != "pieces")
    elif kind == "olmo":
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    (folder / "SHA256SUMS").unlink()
    write_gguf(tmp_path / "model.gguf", folder, "f32", name="tiny")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text for text in TEXTS if text]
    theirs = their_logps(llama_cpp, tmp_path / "model.gguf", texts, model.config.vocab_size)
    for row, text in zip(theirs, texts, strict=True):
        ids = np.array([tokenizer.encode(text).ids])
        # Other tokens give other log-probabilities, by about 1.
        np.testing.assert_allclose(row, jax.nn.log_softmax(our_logits(model, params, ids)[0, -1]), atol=1e-3)
