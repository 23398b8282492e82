"""Every family against transformers on torch, eager attention: its sdpa leaves out soft-caps."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.losses import balance_loss
from kto_jax.models.families import FAMILIES
from kto_jax.models.families.config_json import read_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from tests.models.families.family_files import FILES, WINDOW
from tests.parity.test_transformers import greedy, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
LENGTHS, ROW = (13, 17), 32
# All tests of a family share one pair of models, hence one worker.
EACH = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FILES]
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


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


def as_stored(tensors, name):
    """Tensors by the names of files, where every expert has its own; in transformers' models a layer has one."""
    stored = {}
    for key, values in tensors.items():
        block, found, matrix = key.partition(".mlp.experts.")
        if name == "mixtral":
            key, block = key.replace(".mlp.", ".block_sparse_moe."), block + ".block_sparse_moe.experts"
            names = {"gate": "w1", "up": "w3", "down": "w2"}
        else:
            block, names = block + ".mlp.experts", {part: f"{part}_proj" for part in ("gate", "up", "down")}
        if not found:
            stored[key] = values
            continue
        for expert, whole in enumerate(values):
            parts = {"down": whole}
            if matrix == "gate_up_proj":
                parts = dict(zip(("gate", "up"), np.split(whole, 2), strict=True))
            stored |= {f"{block}.{expert}.{names[part]}.weight": each for part, each in parts.items()}
    return stored


class Pair:
    """A random model as transformers made and saved it, the same as it was read here, and what is asked of both."""

    def __init__(self, torch, transformers, name, directory):
        (directory / "written").mkdir()
        (directory / "written" / "config.json").write_text(json.dumps(FILES[name]))
        config = transformers.AutoConfig.from_pretrained(directory / "written")
        self.theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in self.theirs.parameters():  # Norms and biases as well.
            tensor.data.normal_(0.0, 0.3, generator=generator)
        self.path = directory / "theirs"
        self.theirs.save_pretrained(self.path)
        self.model = Model.create(read_config(self.path), remat="full")
        self.params = load_params(self.model, self.path, param_dtype="float32")
        random = np.random.default_rng(0)
        # 0 pads Gemma's batches, and torch gives its embedding no gradient.
        self.sequences = [random.integers(1, 64, length) for length in LENGTHS]
        self.logits, self.gradient = self.ask(self.params)

    def ask(self, params):
        """Logits of one packed row, and the gradient of the sum of its tokens' log-probabilities."""
        padding = [0] * (ROW - sum(LENGTHS))
        tokens = np.array([[*np.concatenate(self.sequences), *padding]])
        segments = np.array([[1] * LENGTHS[0] + [2] * LENGTHS[1] + padding])
        positions = np.array([[*range(LENGTHS[0]), *range(LENGTHS[1]), *padding]])
        targets = np.roll(tokens, -1, axis=1)
        counts = (segments > 0) & (segments == np.roll(segments, -1, axis=1))

        def total(params):
            hidden = self.model.hidden_states(params, tokens, segments, positions)
            logps = self.model.token_logps(params, hidden, jnp.asarray(targets))
            return jnp.sum(jnp.where(counts, logps, 0)), self.model.logits(params, hidden)

        (_, logits), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        first, second, _ = np.split(np.asarray(logits)[0], np.cumsum(LENGTHS))
        return (first, second), gradient


@pytest.fixture(scope="module")
def pair(torch, transformers, tmp_path_factory):
    made = {}
    return lambda name: (
        made.get(name) or made.setdefault(name, Pair(torch, transformers, name, tmp_path_factory.mktemp(name)))
    )


@pytest.mark.parametrize("name", EACH)
def test_logits_of_packed_rows_are_those_of_transformers_row_by_row(torch, pair, name):
    both = pair(name)
    assert both.model.config == read_config(both.path.parent / "written")
    for ours, sequence in zip(both.logits, both.sequences, strict=True):
        expected = their_logits(torch, both.theirs, sequence[None])[0]
        print(
            f"{name}: logits up to {np.abs(expected).max():.1f} differ by at most {np.abs(ours - expected).max():.1e}"
        )
        close(ours, expected)


@pytest.mark.parametrize("name", EACH)
def test_gradients_of_every_parameter_equal_those_of_transformers(torch, pair, name):
    both = pair(name)
    both.theirs.zero_grad()
    for sequence in both.sequences:
        tokens = torch.tensor(sequence[None])
        logps = torch.log_softmax(both.theirs(tokens).logits[:, :-1], dim=-1)
        logps.gather(-1, tokens[:, 1:, None]).sum().backward()
    expected = as_stored({name: tensor.grad.numpy() for name, tensor in both.theirs.named_parameters()}, name)
    tensors = FAMILIES[both.model.config.family].tensors
    leaves = jax.tree_util.tree_leaves_with_path(both.gradient)
    for path, leaf in leaves:
        tensor = tensors[".".join(part.key for part in path)]
        for index in np.ndindex(leaf.shape[: tensor.num_stacked]):
            ours, gradient = leaf[index], tensor.from_file(expected.pop(tensor.name.format(*index)))
            np.testing.assert_allclose(
                ours, gradient, rtol=1e-3, atol=2e-4 * np.abs(gradient).max(), err_msg=tensor.name
            )
    assert not expected


@pytest.mark.parametrize("name", EACH)
def test_an_export_is_read_back_with_equal_logits(torch, transformers, pair, name, tmp_path):
    both = pair(name)
    save_hugging_face(tmp_path / "ours", both.model, both.params, tokenizer_dir=None, model_card="")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(back) is type(both.theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = both.sequences[1][None]
    np.testing.assert_array_equal(their_logits(torch, back, tokens), their_logits(torch, both.theirs, tokens))


@pytest.mark.parametrize("name", EACH)
def test_greedy_continuations_past_the_window_are_those_of_transformers(torch, pair, name):
    both = pair(name)
    prompt, num_tokens = list(both.sequences[0][:4]), 3 * WINDOW
    theirs = both.theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0
    )
    assert greedy(both.model, both.params, prompt, num_tokens) == theirs[0, 4:].tolist()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "qwen3_moe")
])  # fmt: skip
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
        hidden = both.theirs.model(tokens).last_hidden_state[0, -1].numpy()
        close(scoring(tokens).logits.numpy()[0, 0], hidden @ weight)
    jax.tree.map(np.testing.assert_array_equal, load_params(model, tmp_path / "ours", param_dtype="float32"), params)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("mixtral", "qwen3_moe", "olmoe")
])  # fmt: skip
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
