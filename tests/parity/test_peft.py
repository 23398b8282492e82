"""Exported adapters, loaded by peft on top of the exported base model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import LoraConfig
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.lora import WHOLE, init_adapters, merge_adapters, with_magnitudes
from kto_jax.models.model import Model
from kto_jax.models.weights.adapter_names import resolve_lora
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params
from kto_jax.models.weights.model_files import find_model
from kto_jax.models.weights.peft import read_adapters, save_adapters
from tests.models.families.family_files import FILES
from tests.parity.pairs import Pair
from tests.parity.test_families import close
from tests.parity.test_transformers import our_logits, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 13))


def drawn(model, lora):
    """A frozen model of which no bias is 0 and no norm 1, and adapters of which neither matrix is 0."""
    params = model.init_params(jax.random.key(0), "float32")
    adapters = with_magnitudes(init_adapters(params, lora, jax.random.key(1)), params)
    adapters |= {WHOLE[name]: params[WHOLE[name]] for name in lora.modules_to_save}
    leaves, structure = jax.tree.flatten((params, adapters))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


KINDS = {
    "lora": LoraConfig(rank=3, alpha=4.0),
    "few": LoraConfig(rank=8, targets=("value", "down")),
    "rslora": LoraConfig(rank=4, alpha=4.0, rank_stabilised=True, rank_pattern=("query=2",), alpha_pattern=("up=9",)),
    "dora": LoraConfig(rank=3, alpha=4.0, dora=True),
    "whole": LoraConfig(rank=3, targets=("query",), modules_to_save=("embedding",)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for kind in ("lora", "few") for name in ("mistral", "qwen2", "gemma2", "phi3", "gpt_neox")),
        *((name, kind) for kind in ("lora", "few") for name in ("mixtral", "qwen3_moe", "olmoe")),
        *(("mistral", kind) for kind in ("rslora", "dora", "whole")),
        *(("qwen2", kind) for kind in ("dora", "whole")),  # biases, and a tied head
        *(("phi3", kind) for kind in ("rslora", "dora")),
        ("gpt_neox", "dora"),
    ],
)
def test_peft_computes_with_them_what_is_computed_here(torch, transformers, peft, name, kind, tmp_path):
    model = Model.create(read_config_json(FILES[name]), remat="none")
    lora = resolve_lora(KINDS[kind], model.config)
    params, adapters = drawn(model, lora)
    save_hugging_face(tmp_path / "base", model, params, tokenizer_dir=None, model_card="")
    save_adapters(
        tmp_path / "adapter", model, adapters, lora=lora, base=str(tmp_path / "base"), tokenizer_dir=None, model_card=""
    )
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    plain = their_logits(torch, base, TOKENS)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    laid = merge_adapters(params, adapters, lora)
    ours, expected = our_logits(model, laid, TOKENS), their_logits(torch, theirs, TOKENS)
    print(f"{name}, {kind}: logits differ by at most {np.abs(ours - expected).max():.1e}")
    assert np.max(np.abs(ours - plain)) > 0.1
    close(ours, expected)
    # What was written is read as the same model.
    files = find_model(str(tmp_path / "adapter"))
    close(our_logits(model, load_params(model, files, param_dtype="float32"), TOKENS), expected)
    save_hugging_face(tmp_path / "merged", model, laid, tokenizer_dir=None, model_card="")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    close(their_logits(torch, merged, TOKENS), ours)


THEIRS = {
    "rslora": {"use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True, "target_modules": r".*\.(q_proj|down_proj)"},
    "whole": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_made_is_read_and_trained_further(torch, transformers, peft, kind, tmp_path):
    model = Model.create(read_config_json(FILES["mistral"]), remat="none")
    params = model.init_params(jax.random.key(0), "float32")
    save_hugging_face(tmp_path / "base", model, params, tokenizer_dir=None, model_card="")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **THEIRS[kind])
    theirs = peft.get_peft_model(base, options)
    for leaf in theirs.parameters():
        if leaf.requires_grad:
            leaf.data += 0.1 * torch.randn(leaf.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = their_logits(torch, theirs.eval(), TOKENS)
    files = find_model(str(tmp_path / "adapter"), str(tmp_path / "base"))
    close(our_logits(model, load_params(model, files, param_dtype="float32"), TOKENS), expected)
    settings = {
        "rslora": {"rank_stabilised": True, "rank_pattern": ("query=2",)},
        "dora": {"dora": True, "targets": ("query", "down")},
        "whole": {"targets": ("value",), "modules_to_save": ("embedding", "head")},
    }[kind]
    lora = resolve_lora(LoraConfig(rank=3, alpha=5.0, **settings), model.config)
    trained = read_adapters(tmp_path / "adapter", model, lora)
    if kind == "whole":
        whole = load_params(model, files, param_dtype="float32")
        trained |= {"embed": whole["embed"], "head": whole["head"]}
    close(our_logits(model, merge_adapters(params, trained, lora), TOKENS), expected)


def test_gradients_of_dora_are_those_of_peft(torch, transformers, peft, tmp_path):
    model, lora = Model.create(read_config_json(FILES["mistral"]), remat="none"), KINDS["dora"]
    params, adapters = drawn(model, lora)
    save_hugging_face(tmp_path / "base", model, params, tokenizer_dir=None, model_card="")
    save_adapters(
        tmp_path / "adapter", model, adapters, lora=lora, base=str(tmp_path / "base"), tokenizer_dir=None, model_card=""
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    theirs(torch.tensor(TOKENS)).logits.square().sum().backward()
    found = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters() if tensor.grad is not None}

    def total(adapters):
        return jnp.sum(jnp.square(our_logits(model, merge_adapters(params, adapters, lora), TOKENS)))

    pair = jax.grad(total)(adapters)["layers"]["mlp"]["up"]["weight"]
    module = "base_model.model.model.layers.1.mlp.up_proj."
    for ours, name in (
        (pair.a[1].T, "lora_A.default.weight"), (pair.b[1].T, "lora_B.default.weight"),
        (pair.magnitude[1], "lora_magnitude_vector.default.weight"),
    ):  # fmt: skip
        expected = found[module + name]
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


def test_adapters_of_a_model_that_reads_images_open_on_it(torch, transformers, peft, tmp_path):
    both = Pair(torch, transformers, "gemma3_multimodal", tmp_path)
    model, lora = both.model, resolve_lora(KINDS["lora"], both.model.config)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(both.params, lora, jax.random.key(1)))
    save_adapters(
        tmp_path / "adapter", model, adapters, lora=lora, base=str(both.path), tokenizer_dir=None, model_card="",
        is_multimodal=True,
    )  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
    expected = their_logits(torch, theirs, TOKENS)
    close(our_logits(model, merge_adapters(both.params, adapters, lora), TOKENS), expected)
    files = find_model(str(tmp_path / "adapter"))
    close(our_logits(model, load_params(model, files, param_dtype="float32"), TOKENS), expected)


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

    laid = ours(merge_adapters(params, adapters, lora) | scorer)
    assert np.min(np.abs(laid - ours(params | scorer))) > 0.01
    found = np.concatenate([their_logits(torch, theirs, row[None])[:, 0] for row in TOKENS])
    close(laid, found)
