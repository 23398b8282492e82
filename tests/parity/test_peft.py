"""Exported adapters, loaded by peft on top of the exported base model."""

import jax
import numpy as np
import pytest

from kto_jax.config import LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.lora import init_adapters, merge_adapters
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.peft import save_adapters
from tests.models.families.family_files import FILES
from tests.parity.test_families import close
from tests.parity.test_transformers import our_logits, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 13))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def drawn(model, lora):
    """A frozen model of which no bias is 0 and no norm 1, and adapters of which neither matrix is 0."""
    params = model.init_params(jax.random.key(0), "float32")
    adapters = init_adapters(params, lora, jax.random.key(1))
    leaves, structure = jax.tree.flatten((params, adapters))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@pytest.mark.parametrize("lora", [LoraConfig(rank=3, alpha=4.0), LoraConfig(rank=8, targets=("value", "down"))])
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "mixtral", "qwen3_moe", "olmoe"])
def test_peft_computes_with_them_what_is_computed_here(torch, transformers, peft, name, lora, tmp_path):
    model = Model.create(read_config_json(FILES[name]), remat="none")
    params, adapters = drawn(model, lora)
    save_hugging_face(tmp_path / "base", model, params, tokenizer_dir=None, model_card="")
    save_adapters(
        tmp_path / "adapter", model, adapters, lora=lora, base=str(tmp_path / "base"), tokenizer_dir=None, model_card=""
    )
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    plain = their_logits(torch, base, TOKENS)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = our_logits(model, merge_adapters(params, adapters, lora.alpha / lora.rank), TOKENS)
    assert np.max(np.abs(ours - plain)) > 0.1
    close(ours, their_logits(torch, theirs, TOKENS))
    save_hugging_face(
        tmp_path / "merged",
        model,
        merge_adapters(params, adapters, lora.alpha / lora.rank),
        tokenizer_dir=None,
        model_card="",
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    close(their_logits(torch, merged, TOKENS), ours)


def test_peft_scores_with_the_adapters_and_the_head_of_a_reward_model(torch, transformers, peft, tmp_path):
    """On top of the language model that the reward model was trained from."""
    lora = LoraConfig(rank=3, alpha=4.0)
    config = read_config_json(FILES["mistral"])
    language_model, model = Model.create(config, remat="none"), Model.create(config, remat="none", scalar_head="reward")
    params, adapters = drawn(language_model, lora)
    scorer = {"scorer": {"weight": 0.5 * jax.random.normal(jax.random.key(3), (32,))}}
    base = tmp_path / "base"
    save_hugging_face(base, language_model, params, tokenizer_dir=None, model_card="")
    save_adapters(
        tmp_path / "adapter", model, adapters | scorer, lora=lora, base=str(base), tokenizer_dir=None, model_card=""
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    positions = np.broadcast_to(np.arange(TOKENS.shape[1])[None], TOKENS.shape)

    def ours(params):
        hidden = model.hidden_states(params, TOKENS, np.ones_like(TOKENS), positions)
        return model.apply_scalar_head(params, hidden[:, -1])

    laid = ours(merge_adapters(params, adapters, lora.alpha / lora.rank) | scorer)
    assert np.min(np.abs(laid - ours(params | scorer))) > 0.01
    found = np.concatenate([their_logits(torch, theirs, row[None])[:, 0] for row in TOKENS])
    close(laid, found)
