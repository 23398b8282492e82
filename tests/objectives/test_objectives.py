import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import losses, values
from kto_jax.config import ConfigError, ObjectiveConfig
from kto_jax.objectives import OBJECTIVES, auto_weights, check_objective, make_objective
from kto_jax.shapes import Completions, TokenScores

auto = ObjectiveConfig(desirable_weight="auto")


@pytest.mark.parametrize("desirable, undesirable, expected", [
    (100, 300, (3.0, 1.0)), (400, 200, (1.0, 1.5)), (100, 100, (1.0, 1.0)), (400, 300, (1.0, 1.0)), (5, 4, (1.0, 1.0)),
])  # fmt: skip
def test_auto_raises_the_weight_that_must_rise(desirable, undesirable, expected):
    weights = auto_weights(auto, desirable, undesirable)
    assert weights == pytest.approx(expected)
    ratio = weights[0] * desirable / (weights[1] * undesirable)
    assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9


def test_numbers_are_taken_as_they_are():
    config = ObjectiveConfig(desirable_weight=13.33, undesirable_weight=0.5)
    assert auto_weights(config, 10, 1000) == (13.33, 0.5)


def test_auto_beside_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be combined with undesirable_weight=5.0"):
        auto_weights(dataclasses.replace(auto, undesirable_weight=5.0), 10, 10)


def test_auto_with_one_class_is_refused():
    with pytest.raises(ConfigError, match="0 undesirable"):
        auto_weights(auto, 10, 0)


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'kto'"):
        make_objective(ObjectiveConfig(name="ktoo"), num_desirable=1, num_undesirable=1)


def completions(policy, reference, desirable, lengths=None):
    policy, reference = jnp.array(policy), jnp.array(reference)
    lengths = jnp.full(policy.shape, 4.0) if lengths is None else jnp.array(lengths)
    zeros = jnp.zeros_like(policy)
    return Completions(policy, reference, policy, lengths, jnp.array(desirable), zeros, jnp.ones(policy.shape, bool))


def make(name="kto", **options):
    return make_objective(ObjectiveConfig(name=name, **options), num_desirable=100, num_undesirable=300)


def test_kto_uses_the_resolved_weights():
    objective = make(desirable_weight="auto")
    seen = completions([[1.0, 2.0]], [[0.0, 0.0]], [[True, False]])
    expected = losses.kto_loss(seen.policy, seen.reference, seen.desirable, jnp.array(0.5), desirable_weight=3.0)
    np.testing.assert_array_equal(objective.loss(seen, jnp.array(0.5), {}), expected)
    assert objective.options["desirable_weight"] == 3


def test_parity_mode_divides_by_the_nonzero_log_ratios():
    seen = completions([[4.0, 1.0, 9.0]], [[1.0, 1.0, 0.0]], [[True] * 3])
    seen = dataclasses.replace(seen, filled=jnp.array([[True, True, False]]))
    for nonzero, expected in ((False, 1.5), (True, 3.0)):
        assert make(kl_nonzero_mean=nonzero).reference_point(seen) == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_refuses_the_options_of_others_and_lists_its_own(name):
    own = inspect.signature(OBJECTIVES[name]).parameters
    others = {"beta": 0.7, "margin": 0.3, "as_printed": True, "odds_weight": 0.2, "trace": 0.5}
    for option, value in others.items():
        config = ObjectiveConfig(name=name, **{option: value})
        if option in own:
            assert make_objective(config, num_desirable=1, num_undesirable=1).options[option] == value
        else:
            with pytest.raises(ConfigError, match=f"config.objective.{option}={value} has no effect .* It uses"):
                check_objective(config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_option_of_every_objective_is_a_field_of_the_configuration(name):
    fields = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert set(inspect.signature(OBJECTIVES[name]).parameters) <= fields


@pytest.mark.parametrize("options, message", [
    ({"name": "kto", "variant": "zeero"}, "'zeero' is not a variant of kto"),
    ({"name": "dpo", "variant": "ipoo"}, "'ipoo' is not a DPO variant"),
    ({"name": "dpo", "variant": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning"),
    ({"name": "kto", "alpha": 0.5}, "only the variant kahneman_tversky"),
    ({"name": "kto", "variant": "kahneman_tversky", "alpha": 1.5}, r"alpha=1.5 .* must be in \(0, 1\]"),
    ({"name": "dpo", "alpha": 0.3}, "alpha=0.3 with f_divergence='reverse_kl'"),
    ({"name": "kto", "variant": "zero", "kl_nonzero_mean": True}, "no KL to average"),
    ({"name": "orpo", "humanline": True}, "uses no log-ratios"),
    ({"name": "reward", "sft_weight": 0.1}, "has no effect on a reward model"),
    ({"name": "kto", "humanline_low": -2.0}, "humanline_low=-2.0 has no effect"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize("variant, expected", [
    ("standard", lambda z: jax.nn.sigmoid(z)), ("log_sigmoid", jax.nn.log_sigmoid), ("identity", lambda z: z),
    ("kahneman_tversky", values.kahneman_tversky),
])  # fmt: skip
def test_variants_of_kto_are_its_value_functions(variant, expected):
    seen = completions([[7.0, -3.0]], [[0.0, 1.0]], [[True, False]])
    losses_of = make(variant=variant, beta=0.2).loss(seen, jnp.array(2.0), {})
    np.testing.assert_allclose(losses_of, 1 - expected(jnp.array([[1.0, 1.2]])), rtol=1e-6)


def test_variants_of_kto_are_its_reference_points():
    seen = completions([[8.0, -4.0, 4.0, 2.0]], [[0.0, 0.0, 2.0, 0.0]], [[True, False, True, False]])
    assert make(variant="zero").first_pass == "none"
    assert make().reference_point(seen) == 2.0
    assert make(variant="reference_free").reference_point(seen) == 2.5 / 4
    below = dataclasses.replace(seen, policy=-seen.policy)
    assert make().reference_point(below) == 0.0
    assert make(variant="reference_free").reference_point(below) == -2.5 / 4  # not clamped
    np.testing.assert_array_equal(make(variant="simple").reference_point(seen), [[0.0, 5.0, 0.0, 5.0]])


def test_the_loss_of_a_pair_is_in_the_slot_of_its_chosen_completion():
    seen = completions([[-20.0, -24.0, -9.0, -9.0]], [[-21.0, -22.0, -8.0, -8.0]], [[True, False, True, False]])
    np.testing.assert_allclose(make("dpo").loss(seen, jnp.array(0.0), {}), [[0.5544, 0, 0.6931, 0]], atol=1e-4)
    np.testing.assert_array_equal(make("dpo").counts(seen.filled, seen.desirable), [[True, False, True, False]])


def test_pairs_are_read_by_every_loss_of_pairs():
    policy, lengths = [[-20.0, -24.0]], [[4.0, 8.0]]
    seen = completions(policy, [[-21.0, -22.0]], [[True, False]], lengths)
    w, l = jnp.array([-20.0]), jnp.array([-24.0])  # noqa: E741
    mean_w, mean_l = jnp.array([-5.0]), jnp.array([-3.0])
    four = (w, l, jnp.array([-21.0]), jnp.array([-22.0]))
    z0 = jnp.array(0.3)
    expected = {
        "dpo": losses.dpo_loss(
            *four, variant="ipo", chosen_lengths=jnp.array([4.0]), rejected_lengths=jnp.array([8.0])
        ),
        "kto_log_utility": losses.log_utility_loss(*four, z0),
        "orpo": losses.orpo_loss(mean_w, mean_l),
        "simpo": losses.simpo_loss(mean_w, mean_l),
        "cpo": losses.cpo_loss(w, l, mean_w),
        "slic": losses.slic_loss(w, l, mean_w),
        "reward": losses.bradley_terry_loss(w, l),
    }
    for name, loss in expected.items():
        objective = make(name, **({"variant": "ipo"} if name == "dpo" else {}))
        np.testing.assert_array_equal(objective.loss(seen, z0, {})[0], [loss[0], 0], err_msg=name)
        assert objective.reads == "pairs"


def test_csft_puts_each_control_before_its_own_class_and_is_measured_by_the_desirable_completions():
    objective = make("csft")
    assert objective.controls == ("<|bad|>", "<|good|>")  # undesirable, desirable, as the plan reads them
    assert objective.reads == "thumbs"
    assert objective.evaluated_as.reads == "desirable"


def test_the_sft_term_is_of_desirable_completions_alone():
    seen = completions([[-8.0, -4.0]], [[-8.0, -4.0]], [[True, False]])
    np.testing.assert_allclose(
        make("apo_zero_unpaired", sft_weight=0.5).loss(seen, jnp.array(0.0), {}), [[0.5 + 0.5 * 2, 0.5]]
    )


def test_the_sft_term_is_of_the_likelihood_itself_where_humanline_clamps_log_ratios():
    seen = completions([[-8.0]], [[-8.0]], [[True]])
    seen = dataclasses.replace(seen, likelihood=jnp.array([[-20.0]]))
    np.testing.assert_allclose(make("kto", humanline=True, sft_weight=1.0).loss(seen, jnp.array(0.0), {}), [[0.5 + 5]])


def test_rewards_of_a_divergence_are_those_that_its_loss_compares():
    objective = make("dpo", f_divergence="forward_kl", beta=0.5)
    seen = completions([[1.0, -2.0]], [[0.0, 0.0]], [[True, False]])
    rewards = objective.rewards(seen)
    np.testing.assert_allclose(rewards, [[0.5 * (1 - np.exp(-1)), 0.5 * (1 - np.exp(2))]], rtol=1e-6)
    expected = -jax.nn.log_sigmoid(rewards[0, 0] - rewards[0, 1])
    np.testing.assert_allclose(objective.loss(seen, jnp.array(0.0), {})[0, 0], expected, rtol=1e-6)


def test_auto_weights_of_pairs_count_pairs():
    options = make("kto_log_utility", desirable_weight="auto").options  # 100 and 300 thumbs
    assert (options["desirable_weight"], options["undesirable_weight"]) == (1, 1)


def test_bco_pair_centres_by_the_mean_of_earlier_rewards_too():
    objective = make("dpo", variant="bco_pair")
    seen = completions([[5.0, 5.0]], [[0.0, 0.0]], [[True, False]])
    state = {"running_mean": jnp.array(0.5), "running_count": jnp.array(4.0)}
    np.testing.assert_allclose(objective.loss(seen, jnp.array(0.0), state), [[2 * np.log(2), 0]], rtol=1e-6)
    assert objective.next_state(state, jnp.array([[2.5, 0.5]]), seen.filled)["running_mean"] == pytest.approx(5 / 6)


def test_bco_centres_by_the_mean_of_earlier_rewards():
    objective = make("bco")
    seen = completions([[5.0, 5.0]], [[0.0, 0.0]], [[True, False]])
    state = {name: jnp.array(value) for name, value in objective.initial_state.items()}
    np.testing.assert_allclose(
        objective.loss(seen, jnp.array(0.0), state), [[0.4741, 0.9741]], atol=1e-4
    )  # −log σ(±0.5)
    state = objective.next_state(state, objective.rewards(seen), seen.filled)
    assert {name: float(value) for name, value in state.items()} == {"running_mean": 0.5, "running_count": 2.0}
    np.testing.assert_allclose(objective.loss(seen, jnp.array(0.0), state), [[0.6931, 0.6931]], atol=1e-4)


def test_offline_ppo_by_hand():
    """Two completions in one row: 2 tokens, thumbs-up; 1 token, thumbs-down."""
    tokens = TokenScores(
        policy=jnp.log(jnp.array([[0.5, 0.2, 0.9, 0.1]])),
        reference=jnp.log(jnp.array([[0.5, 0.4, 0.1, 0.1]])),
        values=jnp.array([[0.5, 0.25, 0.0, 7.0]]),
        segments=jnp.array([[1, 1, 2, 0]]),
    )
    seen = completions([[0.0, 0.0]], [[0.0, 0.0]], [[True, False]], [[2.0, 1.0]])
    seen = dataclasses.replace(seen, tokens=tokens)
    objective = make("ppo_offline", trace=1.0, kl_weight=0.2, value_weight=2.0)
    # Thumbs-up: advantages 1 − V = 0.5, 0.75; ratios 1, 0.5. Thumbs-down: advantage −1; ratio 9, which counts: a bad
    # token that became likelier is pushed down however far it is.
    up = -(1 * 0.5 + 0.5 * 0.75) + 0.2 * np.log(0.5) + 2.0 * 0.5 * (0.5**2 + 0.75**2)
    down = 9.0 + 0.2 * np.log(9.0) + 2.0 * 0.5 * 1.0
    np.testing.assert_allclose(objective.loss(seen, jnp.array(0.0), {}), [[up / 2, down]], rtol=1e-5)
    scored = dataclasses.replace(seen, scores=jnp.array([[1.0, -1.0]]), desirable=~seen.desirable)
    by_scores = make("ppo_offline", trace=1.0, kl_weight=0.2, value_weight=2.0, rewards="scores")
    np.testing.assert_allclose(by_scores.loss(scored, jnp.array(0.0), {}), [[up / 2, down]], rtol=1e-5)


@pytest.mark.parametrize("variant, expected", [
    ("grpo", [(-2 * 1.2 - 2 * 0.5) / 2, -0.5]),
    ("dr_grpo", [(-2 * 1.2 - 2 * 0.5) / 10, -0.05]),
    ("rloo", [(-2 * 1.2 - 2 * 0.5) / 10, -0.05]),
    ("dapo", [-2 * 1.28 - 2 * 0.5, -0.5]),
    ("gspo", [-2 * np.sqrt(1.5 * 0.5), -0.5]),
    ("cispo", [-2 * 1.5 * np.log(0.75) - 2 * 0.5 * np.log(0.2), -0.5 * np.log(0.9)]),
])  # fmt: skip
def test_the_variants_of_grpo_sum_their_tokens_as_their_papers_do(variant, expected):
    """Two completions in one row, with advantages 2 and 0.5 and ratios 1.5, 0.5 and 1."""
    policy, old = [0.75, 0.2, 0.9, 0.1], [0.5, 0.4, 0.9, 0.3]
    tokens = TokenScores(
        policy=jnp.log(jnp.array([policy])), reference=jnp.log(jnp.array([old])), values=jnp.zeros((1, 4)),
        segments=jnp.array([[1, 1, 2, 0]]),
    )  # fmt: skip
    seen = completions([[0.0, 0.0]], [[0.0, 0.0]], [[True, True]], [[2.0, 1.0]])
    seen = dataclasses.replace(seen, tokens=tokens, scores=jnp.array([[2.0, 0.5]]))
    options = {"length_scale": 10.0} if variant in ("dr_grpo", "rloo") else {}
    objective = make("grpo", variant=variant, **options)
    np.testing.assert_allclose(objective.loss(seen, jnp.array(0.0), {}), [expected], rtol=1e-5)
    assert objective.mean_over == ("tokens" if variant in ("dapo", "cispo") else "examples")
