"""Every loss beside its independent version and inputs to compare them at; read by the tests and the benchmark."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax import losses, values
from tests.losses import oracle

NUM_INPUTS = 1000
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
      loss: (arrays) -> losses, of kto_jax.
      oracle: (the same arrays) -> (losses, gradients by the first arguments), in float64.
      inputs: (generator, number) -> the arrays, in float32.
      num_log: how many of the first arrays may hold ±1e4.
    """

    loss: Callable
    oracle: Callable
    inputs: Callable
    num_log: int


def of_singles(rng, size):
    policy = rng.normal(-80, 40, size)
    return (*f32(policy, policy + rng.normal(0, 30, size)), rng.random(size) < 0.4)


def of_pairs(rng, size):
    reference = rng.normal(-80, 40, (2, size))
    return f32(*(reference + rng.normal(0, 30, (2, size))), *reference)


def of_pairs_with_lengths(rng, size):
    return of_pairs(rng, size) + f32(*rng.integers(1, 300, (2, size)))


def of_means(rng, size):
    return f32(*-rng.gamma(1.5, 1.0, (2, size)))


def of_pairs_without_reference(rng, size):
    return f32(*rng.normal(-80, 15, (2, size)), -rng.gamma(1.5, 1.0, size))


def of_rewards(rng, size):
    return f32(*rng.normal(0, 3, (2, size)))


def of_sums(rng, size):
    return f32(rng.normal(-80, 40, size), rng.integers(1, 300, size))


def of_ratios(rng, size):
    return f32(rng.normal(0, 2, size))


def of_tokens(rng, size, num_others=1):
    """Log-probs of tokens, others near them, something normal for each token, a mask."""
    shape = (size // 20, 20)
    logps = -rng.gamma(1.5, 1.0, shape)
    others = [logps + rng.normal(0, 0.5, shape) for _ in range(num_others)]
    return (*f32(logps, *others, rng.normal(0, 2, shape)), rng.random(shape) < 0.8)


def of_values(rng, size):
    shape = (size // 20, 20)
    old = rng.normal(0, 1, shape)
    return (*f32(old + rng.normal(0, 0.4, shape), old, rng.normal(0, 1, shape)), rng.random(shape) < 0.8)


def of_rollouts(rng, size):
    shape = (size // 20, 20)
    return (*f32(rng.normal(0, 1, shape), rng.normal(0, 1, shape)), rng.random(shape) < 0.8)


def of_groups(rng, size):
    return f32(rng.normal(0, 3, (size // 8, 8)))


def f32(*arrays):
    return tuple(np.asarray(x, np.float32) for x in arrays)


def of_kto(value_fn, value_oracle):
    def loss(policy, reference, desirable):
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
        return losses.kto_loss(policy, reference, desirable, jnp.array(4.25), value_fn=value_fn, **weights)

    return Case(loss, functools.partial(oracle.kto_with_value, value=value_oracle), of_singles, 2)


def of_dpo(variant, eps=0.0, delta=0.0, divergence="reverse_kl"):
    options = {"variant": variant, "label_smoothing": eps, "running_mean": delta, "f_divergence": divergence}

    def loss(*arrays):
        lengths = dict(zip(("chosen_lengths", "rejected_lengths"), arrays[4:], strict=False))
        return losses.dpo_loss(*arrays[:4], **options, **lengths)

    independent = functools.partial(oracle.dpo, variant=variant, eps=eps, delta=delta, divergence=divergence)
    return Case(loss, independent, of_pairs_with_lengths if variant == "ipo" else of_pairs, 4)


def simple_kto(policy, reference, desirable):
    z0 = losses.opposite_class_reference_point(policy, reference, desirable)
    return losses.kto_loss(policy, reference, desirable, z0)


def bco(policy, reference, desirable):
    return losses.bco_loss(policy, reference, desirable, jnp.array(0.6))


def log_utility(as_printed):
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8, "as_printed": as_printed}

    def loss(*arrays):
        return losses.log_utility_loss(*arrays, jnp.array(4.25), **weights)

    return Case(loss, functools.partial(oracle.log_utility, as_printed=as_printed), of_pairs, 4)


def with_where(function, **options):
    return lambda *arrays: function(*arrays[:-1], where=arrays[-1], **options)


bradley_terry = functools.partial(losses.bradley_terry_loss, margin=0.5, centring=0.01)
offline_clip = {"clip_low": 0.75, "clip_high": 3.0}

CASES: dict[str, Case] = {
    "kto": of_kto(values.sigmoid, oracle.value_sigmoid),
    "kto log_sigmoid": of_kto(values.log_sigmoid, oracle.value_log_sigmoid),
    "kto identity": of_kto(values.identity, oracle.value_identity),
    "kto kahneman_tversky": of_kto(values.kahneman_tversky, oracle.value_kahneman_tversky),
    "kto simple": Case(simple_kto, oracle.simple_kto, of_singles, 2),
    "kto log_utility": log_utility(as_printed=False),
    "kto log_utility as printed": log_utility(as_printed=True),
    "apo_zero_unpaired": Case(losses.apo_zero_unpaired_loss, oracle.apo_zero_unpaired, of_singles, 2),
    "bco": Case(bco, oracle.bco, of_singles, 2),
    "dpo sigmoid": of_dpo("sigmoid"),
    "dpo sigmoid, smoothed": of_dpo("sigmoid", eps=0.2),
    "dpo robust": of_dpo("robust", eps=0.2),
    "dpo hinge": of_dpo("hinge"),
    "dpo ipo": of_dpo("ipo"),
    "dpo exo_pair": of_dpo("exo_pair"),
    "dpo exo_pair, smoothed": of_dpo("exo_pair", eps=0.2),
    "dpo nca_pair": of_dpo("nca_pair"),
    "dpo bco_pair": of_dpo("bco_pair", delta=0.6),
    "dpo sppo_hard": of_dpo("sppo_hard"),
    "dpo apo_zero": of_dpo("apo_zero"),
    "dpo apo_down": of_dpo("apo_down"),
    "dpo forward_kl": of_dpo("sigmoid", divergence="forward_kl"),
    "dpo js": of_dpo("sigmoid", divergence="js"),
    "dpo alpha": of_dpo("sigmoid", divergence="alpha"),
    "orpo": Case(losses.orpo_loss, oracle.orpo, of_means, 2),
    "simpo": Case(losses.simpo_loss, oracle.simpo, of_means, 2),
    "cpo": Case(losses.cpo_loss, oracle.cpo, of_pairs_without_reference, 3),
    "slic": Case(losses.slic_loss, oracle.slic, of_pairs_without_reference, 3),
    "sft": Case(losses.sft_loss, oracle.sft, of_sums, 1),
    "reward": Case(bradley_terry, functools.partial(oracle.bradley_terry, margin=0.5, centring=0.01), of_rewards, 2),
    "ppo_clip": Case(with_where(losses.ppo_clip_loss), oracle.ppo_clip, of_tokens, 3),
    "ppo_clip offline": Case(
        with_where(losses.ppo_clip_loss, **offline_clip),
        functools.partial(oracle.ppo_clip, low=0.75, high=3.0),
        of_tokens,
        3,
    ),
    "policy_gradient": Case(
        lambda logps, old, advantages, where: losses.policy_gradient_loss(logps, old, advantages[..., 0], where=where),
        lambda logps, old, advantages, where: oracle.ppo_clip(
            logps, old, np.broadcast_to(advantages[..., :1], advantages.shape), where
        ),
        of_tokens,
        3,
    ),
    "ppo_value": Case(with_where(losses.ppo_value_loss), oracle.ppo_value, of_values, 3),
    "k3_kl": Case(
        with_where(lambda p, r, _, where: losses.k3_kl(p, r, where=where)),
        lambda p, r, _, where: oracle.k3(p, r, where),
        of_tokens,
        2,
    ),
    "grpo": Case(with_where(losses.grpo_loss), oracle.grpo, functools.partial(of_tokens, num_others=2), 4),
    "humanline_clamp": Case(losses.humanline_clamp, oracle.humanline, of_ratios, 1),
    "generalized_advantages": Case(
        with_where(losses.generalized_advantages), oracle.generalized_advantages, of_rollouts, 2
    ),
    "group_relative_advantages": Case(losses.group_relative_advantages, oracle.group_relative, of_groups, 1),
    "leave_one_out_advantages": Case(losses.leave_one_out_advantages, oracle.leave_one_out, of_groups, 1),
}


def value_and_gradients(case, arrays, num_gradients):
    """Losses and the gradients of their sum by the first arguments."""

    arrays = tuple(jnp.asarray(x) for x in arrays)

    def total(first):
        result = case.loss(*first, *arrays[num_gradients:])
        return jnp.sum(result), result

    gradients, result = jax.grad(total, has_aux=True)(arrays[:num_gradients])
    return result, gradients


def relative_error(value, expected):
    """Largest |value − expected| / max(1, |expected|)."""
    return float(np.max(np.abs(np.asarray(value, np.float64) - expected) / np.maximum(1, np.abs(expected))))


def errors(case, seed=0):
    """Largest relative errors (of value, of gradient) at random inputs; the latter None where there is no gradient."""
    arrays = case.inputs(np.random.default_rng(seed), NUM_INPUTS)
    expected, expected_gradients = case.oracle(*arrays)
    result, gradients = value_and_gradients(case, arrays, len(expected_gradients))
    by_gradient = [relative_error(*pair) for pair in zip(gradients, expected_gradients, strict=True)]
    return relative_error(result, expected), max(by_gradient, default=None)


def extreme_inputs(case):
    """All combinations of −1e4, 0 and 1e4, over and over, in the arrays that may hold them; the others as drawn."""
    drawn = case.inputs(np.random.default_rng(0), NUM_INPUTS)
    combinations = np.array(list(itertools.product((-1e4, 0.0, 1e4), repeat=case.num_log)))
    extreme = np.resize(combinations, (drawn[0].size, case.num_log)).T
    return (*(x.reshape(drawn[0].shape) for x in f32(*extreme)), *drawn[case.num_log :])


def finite_at_extremes(case):
    """Whether value and gradients by all log-probabilities are finite at ±1e4."""
    result, gradients = value_and_gradients(case, extreme_inputs(case), case.num_log)
    return all(bool(jnp.all(jnp.isfinite(x))) for x in (result, *gradients))
