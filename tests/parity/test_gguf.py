"""GGUF files of every family, read by transformers and by llama.cpp: the same logits and log-probabilities."""

import jax
import numpy as np
import pytest

from kto_jax.exports.gguf_file import write_gguf
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import TINY_MODEL
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
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


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


def their_logps(llama_cpp, file, vocab_size):
    """llama.cpp's log-probabilities of the next token, after each of `LENGTHS` tokens."""
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(file), 256, False
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(settings)
    rows = np.full((len(LENGTHS), vocab_size), np.nan)
    for row, length in zip(rows, LENGTHS, strict=True):
        request = {"prompt": TOKENS[0, :length].tolist(), "max_tokens": 1, "n_probs": vocab_size, "temperature": 0.0}
        # A token that is no whole letter would be answered without its figures.
        answer = server.handle_completions(request | {"logit_bias": [[40, 1000.0]]})
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[one["id"]] = one["logprob"]
    return rows


@pytest.mark.parametrize("name", GGUF_FILES)
def test_llama_cpp_computes_the_same_from_a_gguf_file(llama_cpp, name, tmp_path):
    model, params, file = write_model(tmp_path, name)
    theirs = their_logps(llama_cpp, file, model.config.vocab_size)
    ours = jax.nn.log_softmax(our_logits(model, params, TOKENS)[0])[np.array(LENGTHS) - 1]
    differ = float(np.max(np.abs(theirs - ours)))
    print(f"{name}: log-probabilities differ by at most {differ:.1e}, and spread by {float(np.std(ours)):.2f}")
    assert differ < (5e-3 if name in APPROXIMATE else 1e-4)
