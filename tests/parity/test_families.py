"""Every family against transformers on torch; `python -m tests.parity.table` prints the differences."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from kto_jax.config import ConfigError
from kto_jax.losses import balance_loss
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.families.multimodal import text_name
from kto_jax.models.model import Model
from kto_jax.models.rope import LengthDependent
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from tests.models.families.family_files import LENGTHS, WINDOW
from tests.parity.pairs import ALL_FILES, Pair
from tests.parity.test_transformers import greedy

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
# Each computes nothing that another one does not compute as well, such as Mistral, Gemma 3 and Phi-3 with long factors.
NIGHTLY = ("qwen2", "qwen3", "gemma", "phi3", "gpt_neox_serial", "llama_dynamic", "mistral3_multimodal")


# All tests of a family share one pair of models, hence one worker.
def each_of(names):
    marks = {name: [pytest.mark.xdist_group(name)] + [pytest.mark.nightly] * (name in NIGHTLY) for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


EACH = each_of(ALL_FILES)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 64}])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(transformers, name, changes):
    whole = transformers.AutoConfig.for_model(name, **changes).to_dict()
    sizes = {size: whole[size] for size in SIZES}
    read = read_config_json
    assert read({"model_type": name, **sizes}) == read({**whole, "architectures": None, "model_type": name})


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_have_no_defaults(name):
    with pytest.raises(ConfigError, match=f"lacks {', '.join(SIZES)}"):
        read_config_json({"model_type": name})


@pytest.fixture(scope="module")
def pair(torch, transformers, tmp_path_factory):
    made = {}
    return lambda name: (
        made.get(name) or made.setdefault(name, Pair(torch, transformers, name, tmp_path_factory.mktemp(name)))
    )


@pytest.mark.parametrize("name", EACH)
def test_logits_and_gradients_are_those_of_transformers(pair, name):
    both = pair(name)
    assert both.model.config == read_config(both.path.parent / "written")
    assert max(np.abs(logits).max() for logits in both.expected) > 1
    differences = {what: getattr(both, f"{what}_difference")() for what in ("dense", "packed", "decoded", "gradient")}
    print(name, {what: f"{value:.1e}" for what, value in differences.items()})
    assert differences.pop("gradient") < 5e-4
    assert max(differences.values()) < 1e-4


@pytest.mark.parametrize("name", EACH)
def test_an_export_is_read_back_with_equal_logits(torch, pair, name):
    both = pair(name)
    back, report = both.read_back
    assert type(back).__name__ == FAMILIES[both.model.config.family].causal_lm
    assert both.is_multimodal or type(back) is type(both.theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert both.exported_difference() < 1e-6  # not 0: gelu_fast is written as gelu_pytorch_tanh


@pytest.mark.parametrize("name", EACH)
def test_import_export_and_import_keep_every_byte(pair, name, tmp_path):
    both = pair(name)
    first = both.export()
    assert read_config(first) == both.model.config
    again = load_params(both.model, first, param_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again, both.params)
    save_hugging_face(tmp_path / "again", both.model, again, tokenizer_dir=None, model_card="")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    theirs = {text_name(name): value for name, value in load_file(both.path / "model.safetensors").items()}
    theirs.pop(None, None)
    ours = load_file(first / "model.safetensors")
    if both.model.config.tied_head:
        theirs.pop("lm_head.weight", None)
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("name", EACH)
def test_greedy_continuations_past_the_window_are_those_of_transformers(torch, pair, name):
    both = pair(name)
    prompt, num_tokens = list(both.sequences[0][:4]), 3 * WINDOW
    if isinstance(both.model.config.rope_scaling, LengthDependent):
        with pytest.raises(ConfigError, match=r"KV cache of 19 tokens.*when a sequence exceeds 16 tokens.*Lower max"):
            greedy(both.model, both.params, prompt, num_tokens)
        num_tokens = 12
    theirs = both.theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
    )
    assert greedy(both.model, both.params, prompt, num_tokens) == theirs[0, 4:].tolist()


DENSE = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox")
OF_REWARDS = (*DENSE, "mixtral", "qwen3_moe")


@pytest.mark.parametrize("name", each_of(OF_REWARDS))
def test_a_reward_model_of_each_family_is_a_class_of_transformers(torch, transformers, pair, name, tmp_path):
    both = pair(name)
    model = Model.create(both.model.config, scalar_head="reward")
    weight = np.linspace(-1, 1, model.config.embed_dim, dtype="f")
    params = {part: leaf for part, leaf in both.params.items() if part != "head"} | {"scorer": {"weight": weight}}
    params = jax.tree.map(jnp.asarray, params)
    save_hugging_face(tmp_path / "ours", model, params, tokenizer_dir=None, model_card="")
    scoring, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    classifier = FAMILIES[model.config.family].classifier
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [classifier]
    assert type(scoring).__name__ == classifier
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = torch.tensor(both.sequences[0][None])
    with torch.no_grad():
        hidden = both.theirs.base_model(tokens).last_hidden_state[0, -1].numpy()
        close(scoring(tokens).logits.numpy()[0, 0], hidden @ weight)
    jax.tree.map(np.testing.assert_array_equal, load_params(model, tmp_path / "ours", param_dtype="float32"), params)


@pytest.mark.parametrize("name", each_of(("mixtral", "qwen3_moe", "olmoe")))
def test_the_load_balancing_loss_is_that_of_transformers(torch, pair, name):
    both = pair(name)
    config, tokens = both.model.config, np.zeros((2, max(LENGTHS)), np.int32)
    where = np.zeros_like(tokens)
    for row, sequence in enumerate(both.sequences):
        tokens[row, : len(sequence)], where[row, : len(sequence)] = sequence, 1
    with torch.no_grad():
        theirs = both.theirs(torch.tensor(tokens), attention_mask=torch.tensor(where), output_router_logits=True)
    positions = np.tile(np.arange(tokens.shape[1]), (2, 1))
    _, routed = jax.jit(both.model.route)(both.params, tokens, where, positions)
    num_tokens = float(where.sum() * config.num_layers)
    ours = balance_loss(jnp.sum(routed.counts, axis=0), jnp.sum(routed.probabilities, axis=0), num_tokens)
    print(f"{name}: load-balancing losses {float(theirs.aux_loss):.6f} and {float(ours):.6f}")
    close(ours, float(theirs.aux_loss))
    weight = both.theirs.config.router_aux_loss_coef
    assert weight == config.balance_weight > 0
