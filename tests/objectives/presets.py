"""Presets of the policy gradient, from rewards to loss and gradient, and float64 numbers worked out by hand.

Read by test_presets.py and by `python -m benchmarks.online_errors`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax.config import ObjectiveConfig
from kto_jax.objectives import make_objective
from kto_jax.rollouts.advantages import advantages
from kto_jax.shapes import SAMPLED, Completions, Sampled, TokenScores

LENGTHS = (3, 1, 4, 2, 2, 5)
REWARDS = (1.0, 0.0, 0.5, -1.0, 2.0, 0.25)
PROMPTS = "aaabbb"
TOLERANCE = 1e-5
TOTAL, COUNT = sum(LENGTHS), len(LENGTHS)
STARTS = np.cumsum(LENGTHS) - LENGTHS


def of(number):
    return slice(STARTS[number], STARTS[number] + LENGTHS[number])


@functools.cache
def tokens():
    """Policy, old policy and reference, values now and at the rollout; float64 [tokens] that float32 holds exactly."""
    rng = np.random.default_rng(2)
    old = -rng.gamma(1.5, 1.0, TOTAL)
    drawn = [old + rng.normal(0, 0.35, TOTAL), old, old + rng.normal(0, 0.5, TOTAL), *rng.normal(0, 1, (2, TOTAL))]
    return tuple(x.astype(np.float32).astype(np.float64) for x in drawn)


# ------------------------------------------------------------------------------------------------ by hand


def group_advantages(kind, scaled, penalty=0.0):
    """Of each token: r − mean of the group, or of the others; perhaps over its standard deviation."""
    _, old, reference, *_ = tokens()
    rewards = np.array([r - penalty * (old - reference)[of(i)].sum() for i, r in enumerate(REWARDS)])
    found = np.zeros(TOTAL)
    for i in range(COUNT):
        group = [j for j in range(COUNT) if PROMPTS[j] == PROMPTS[i]]
        others = [j for j in group if j != i]
        advantage = rewards[i] - rewards[others if kind == "leave_one_out" else group].mean()
        found[of(i)] = advantage / (rewards[group].std() + 1e-4) if scaled else advantage
    return found


def estimated_advantages(penalty, discount, trace):
    """Generalised advantage estimation by its definition, a sum of δ; whitened. And the returns."""
    _, old, reference, _, values = tokens()
    found = np.zeros(TOTAL)
    for i in range(COUNT):
        r, v = -penalty * (old - reference)[of(i)], np.append(values[of(i)], 0.0)
        r[-1] += REWARDS[i]
        delta = r + discount * v[1:] - v[:-1]
        for t in range(LENGTHS[i]):
            found[STARTS[i] + t] = sum((discount * trace) ** k * delta[t + k] for k in range(LENGTHS[i] - t))
    return (found - found.mean()) / found.std(), found + values


def clipped(log_ratio, a, low, high, dual=np.inf):
    """PPO's loss of a token, and its slope by the log-ratio."""
    rho = np.exp(log_ratio)
    kept = min(max(rho, 1 - low), 1 + high)
    value, slope = (-rho * a, -rho * a) if rho * a <= kept * a else (-kept * a, 0.0)
    return (value, slope) if a >= 0 or value <= -dual * a else (-dual * a, 0.0)


def surrogate(advantage, weights, low, high, sequence=False, cispo=False, dual=np.inf):
    """Σ weight · loss and its gradient by the policy's log-probabilities."""
    policy, old = tokens()[:2]
    loss, gradient = 0.0, np.zeros(TOTAL)
    for i in range(COUNT):
        for t in range(*of(i).indices(TOTAL)):
            log_ratio = (policy - old)[of(i)].mean() if sequence else (policy - old)[t]
            if cispo:
                factor = -min(np.exp(log_ratio), 1 + high) * advantage[t]
                value, slope = factor * policy[t], factor
            else:
                value, slope = clipped(log_ratio, advantage[t], low, high, dual)
            loss += weights[t] * value
            if sequence:
                gradient[of(i)] += weights[t] * slope / LENGTHS[i]
            else:
                gradient[t] += weights[t] * slope
    return loss, gradient


BY_TOKEN = np.full(TOTAL, 1 / TOTAL)
BY_SEQUENCE = np.concatenate([np.full(n, 1 / n / COUNT) for n in LENGTHS])
BY_CONSTANT = np.full(TOTAL, 1 / 64 / COUNT)


def reference_term(weight, weights, estimator):
    policy, _, reference, *_ = tokens()
    d = policy - reference
    value, slope = {
        "k1": (d, np.ones(TOTAL)), "k2": (d**2 / 2, d), "k3": (np.exp(-d) + d - 1, 1 - np.exp(-d)),
    }[estimator]  # fmt: skip
    return weight * (weights * value).sum(), weight * weights * slope


def value_term(weight, weights, returns, clip):
    """The clipped loss of the values, and its gradient by them."""
    *_, values, old = tokens()
    near = old + np.clip(values - old, -clip, clip)
    far = (near - returns) ** 2 > (values - returns) ** 2
    slope = np.where(far, (near - returns) * (np.abs(values - old) < clip), values - returns)
    loss = 0.5 * np.where(far, near - returns, values - returns) ** 2
    return weight * (weights * loss).sum(), weight * weights * slope


def both(*terms):
    return sum(value for value, _ in terms), sum(gradient for _, gradient in terms)


def ppo_by_hand(kl=0.05, discount=1.0, trace=0.95, value_weight=0.5, low=0.2, warmup=False, **clip):
    advantage, returns = estimated_advantages(kl, discount, trace)
    loss, gradient = surrogate(advantage, BY_TOKEN, low, 0.2, **clip)
    value_loss, value_gradient = value_term(value_weight, BY_TOKEN, returns, 0.2)
    return (0.0 if warmup else loss) + value_loss, gradient * (not warmup), value_gradient


CASES = {
    "grpo": ({}, lambda: surrogate(group_advantages("group", True), BY_SEQUENCE, 0.2, 0.2)),
    "dr_grpo": ({}, lambda: surrogate(group_advantages("group", False), BY_CONSTANT, 0.2, 0.2)),
    "rloo": ({}, lambda: surrogate(group_advantages("leave_one_out", False), BY_CONSTANT, 0.2, 0.2)),
    "dapo": ({}, lambda: surrogate(group_advantages("group", True), BY_TOKEN, 0.2, 0.28)),
    "gspo": ({}, lambda: surrogate(group_advantages("group", True), BY_SEQUENCE, 3e-4, 4e-4, sequence=True)),
    "cispo": ({}, lambda: surrogate(group_advantages("group", True), BY_TOKEN, 0.2, 4.0, cispo=True)),
    "grpo, k3 in the loss": (
        {"kl_weight": 0.3},
        lambda: both(
            surrogate(group_advantages("group", True), BY_SEQUENCE, 0.2, 0.2), reference_term(0.3, BY_SEQUENCE, "k3")
        ),
    ),
    "dapo, k2 in the loss, dual clip": (
        {"kl_weight": 0.3, "kl_estimator": "k2", "dual_clip": 1.5},
        lambda: both(
            surrogate(group_advantages("group", True), BY_TOKEN, 0.2, 0.28, dual=1.5),
            reference_term(0.3, BY_TOKEN, "k2"),
        ),
    ),
    "dapo, k1 in the loss": (
        {"kl_weight": 0.3, "kl_estimator": "k1"},
        lambda: both(
            surrogate(group_advantages("group", True), BY_TOKEN, 0.2, 0.28), reference_term(0.3, BY_TOKEN, "k1")
        ),
    ),
    "rloo, k1 in the reward": (
        {"kl_weight": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
        lambda: surrogate(group_advantages("leave_one_out", False, 0.1), BY_CONSTANT, 0.2, 0.2),
    ),
    "dr_grpo, entropy": (
        {"entropy_weight": 0.2},
        lambda: both(
            surrogate(group_advantages("group", False), BY_CONSTANT, 0.2, 0.2),
            (0.2 * (BY_CONSTANT * tokens()[0] ** 2 / 2).sum(), 0.2 * BY_CONSTANT * tokens()[0]),
        ),
    ),
    "ppo": ({}, ppo_by_hand),
    "ppo, other settings": (
        {"kl_weight": 0.3, "discount": 0.9, "trace": 0.5, "value_weight": 2.0, "clip_low": 0.1, "dual_clip": 1.5},
        lambda: ppo_by_hand(0.3, 0.9, 0.5, 2.0, 0.1, dual=1.5),
    ),
    "ppo, value_warmup": ({"value_warmup": 1}, lambda: ppo_by_hand(warmup=True)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ as the step does


def objective_of(name, options):
    preset = name.partition(",")[0]
    own = {"name": "ppo"} if preset == "ppo" else {"name": "grpo", "variant": preset, "old_logps": "sampled"}
    return make_objective(ObjectiveConfig(**own, **options), num_desirable=1, num_undesirable=1)


def sampled_of(objective, dtype):
    """The figures that online training makes of the rewards [1, tokens]."""
    _, old, reference, _, values = tokens()
    rollout = [
        {"prompt": p, "prompt_id": p, "completion": "x", "reward": r, "ended": True, "sample": i, "round": 0,
         "prompt_ids": [1], "completion_ids": [2] * LENGTHS[i]}
        for i, (p, r) in enumerate(zip(PROMPTS, REWARDS, strict=True))
    ]  # fmt: skip
    given = {"old_logps": old, "reference_logps": reference, "values": values}
    figures = {name: [np.float32(x[of(i)]) for i in range(COUNT)] for name, x in given.items()}
    rows = advantages(rollout, figures, objective.advantages, keep_cut=True).rows
    return Sampled(*(jnp.asarray([np.concatenate([row[name] for row in rows])], dtype) for name in SAMPLED))


def loss_of(objective, sampled, policy, values):
    """The mean loss of the six completions in one row."""
    segments = jnp.asarray([np.repeat(np.arange(1, COUNT + 1), LENGTHS)])
    scores = TokenScores(policy, sampled.old_logps, values, segments, sampled)
    zeros = jnp.zeros((1, COUNT), policy.dtype)
    seen = Completions(
        policy=zeros, reference=zeros, likelihood=zeros, lengths=jnp.asarray([LENGTHS], policy.dtype),
        desirable=zeros > 0, scores=zeros, filled=zeros == 0, tokens=scores,
    )  # fmt: skip
    state = {name: jnp.asarray(value) for name, value in objective.initial_state.items()}
    divisor = TOTAL if objective.mean_over == "tokens" else COUNT
    return jnp.sum(objective.loss(seen, jnp.zeros(()), state)) / divisor


def differences(name):
    """Loss, gradient by the log-probabilities and gradient by the values: (float32, by hand) each."""
    options, by_hand = CASES[name]
    loss, gradient, *of_values = by_hand()
    objective = objective_of(name, options)
    policy, _, _, values, _ = (jnp.asarray(x[None], jnp.float32) for x in tokens())
    value, (slope, value_slope) = jax.value_and_grad(functools.partial(loss_of, objective), argnums=(1, 2))(
        sampled_of(objective, jnp.float32), policy, values
    )
    return (value, loss), (slope[0], gradient), (value_slope[0], of_values[0] if of_values else np.zeros(TOTAL))
