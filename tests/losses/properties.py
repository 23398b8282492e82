"""Ten properties that KTO and its family must have, each measured: (whether it holds, what was measured).

Read by test_properties.py and by `python -m benchmarks.loss_errors`. Eight CPU devices are needed, fake ones will do.
Source: Ethayarajh et al., arXiv 2402.01306.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kto_jax import curves, losses, values
from kto_jax.data.batches.partners import find_partners
from tests.losses import oracle

WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
# (log-ratio in nats, desirable?, loss) for β = 0.1, z0 = 2, λ = 1: σ(±0.5) = .6225, .3775.
BY_HAND = [(7, True, 0.3775), (2, True, 0.5), (-3, True, 0.6225), (7, False, 0.6225), (2, False, 0.5),
           (-3, False, 0.3775)]  # fmt: skip


def thumbs(seed, size=256, spread=30.0):
    """Log-probs of policy and reference [B], and which are desirable."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(-80, 40, size).astype(np.float32)
    policy = (reference + rng.normal(2, spread, size)).astype(np.float32)
    return jnp.array(policy), jnp.array(reference), jnp.array(rng.random(size) < 0.6)


def deviation(got, expected):
    """Largest |got − expected|."""
    return float(np.max(np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))))


def nothing_is_gained_at_the_reference():
    policy, _, desirable = thumbs(1)
    z0 = float(losses.kl_reference_point(policy, policy))
    # The risk-neutral loss is 1 − (reward − 0).
    rewards = 1 - losses.kto_loss(policy, policy, desirable, jnp.array(0.0), value_fn=values.identity)
    kto = losses.kto_loss(policy, policy, desirable, jnp.array(z0), **WEIGHTS)
    half_weights = np.where(desirable, 1.3, 0.8) / 2
    dpo = losses.dpo_loss(policy, policy - 3, policy, policy - 3)
    by_kto, by_dpo = deviation(kto, half_weights), deviation(dpo, np.full(dpo.shape, math.log(2)))
    reward = deviation(rewards, jnp.zeros_like(rewards))
    return (
        z0 == 0 and reward == 0 and max(by_kto, by_dpo) < 1e-6,
        f"z0 {z0:g}, largest reward {reward:g}; mean KTO loss {float(kto.mean()):.6f}, mean λ/2 "
        f"{half_weights.mean():.6f}; DPO loss {float(dpo.mean()):.6f}, ln 2 {math.log(2):.6f}",
    )


def losses_are_those_worked_out_by_hand():
    ratios, desirable, expected = (jnp.array(x) for x in zip(*BY_HAND, strict=True))
    got = losses.kto_loss(ratios.astype(jnp.float32), jnp.zeros(len(BY_HAND)), desirable, jnp.array(2.0))
    text = ", ".join(
        f"r {r:+d} {'desirable' if good else 'undesirable'} {float(loss):.4f}"
        for (r, good, _), loss in zip(BY_HAND, got, strict=True)
    )
    return deviation(got, expected) < 5e-5, text


def the_gradient_is_the_formula_and_saturates():
    policy, reference, desirable = thumbs(3)

    def gradient_at(policy, reference, desirable, z0, **weights):
        loss = lambda p: jnp.sum(losses.kto_loss(p, reference, desirable, z0, **weights))  # noqa: E731
        return jax.jit(jax.grad(loss))(policy)

    got = gradient_at(policy, reference, desirable, jnp.array(4.25), **WEIGHTS)
    expected = oracle.kto(policy, reference, desirable, 4.25, 0.1, 1.3, 0.8)[1]
    by_formula = deviation(got, expected)
    for_good, for_bad = (
        gradient_at(jnp.array([0.0, 50.0]), jnp.zeros(2), jnp.full(2, good), jnp.array(0.0)) for good in (True, False)
    )
    ratio = float(for_good[0] / for_good[1])
    peaks = deviation(for_good[0], -0.1 / 4), deviation(for_bad[0], 0.1 / 4)
    return (
        by_formula < 1e-7 and max(peaks) < 1e-8 and abs(ratio - 37.6) < 0.05,
        f"largest deviation from the formula {by_formula:.1e} of at most {np.max(np.abs(expected)):.4f}; at z = 0 "
        f"{float(for_good[0]):+.4f} and {float(for_bad[0]):+.4f}, {ratio:.1f} times that of z = 50",
    )


def no_gradient_flows_through_z0():
    policy, reference, desirable = thumbs(4, spread=10.0)

    def gradient(z0_of):
        return jax.grad(lambda p: jnp.sum(losses.kto_loss(p, reference, desirable, z0_of(p))))(policy)

    constant = losses.kl_reference_point(policy, reference)
    held = gradient(lambda p: constant)
    # z0 made without `kl_reference_point` shows that the loss stops the gradient; the other one, that it does itself.
    by_loss = deviation(gradient(lambda p: jnp.maximum(jnp.mean(p - reference), 0)), held)
    of_point = jax.grad(lambda p: losses.kl_reference_point(p, reference))(policy)
    by_point = deviation(of_point, jnp.zeros_like(of_point))
    through = abs(float(jnp.mean(held)))
    return (
        by_loss < 1e-9 and by_point == 0 and constant > 0.5 and through > 1e-4,
        f"z0 {float(constant):.3f}; difference {by_loss:g}, gradient of z0 itself {by_point:g}; let through, it would "
        f"move each gradient by {through:.1e}",
    )


def weights_scale_loss_and_gradient():
    policy, reference, desirable = thumbs(5)

    def total(policy, scale):
        scaled = {name: scale * weight for name, weight in WEIGHTS.items()}
        return jnp.sum(losses.kto_loss(policy, reference, desirable, jnp.array(1.0), **scaled))

    plain, scaled = (jax.value_and_grad(total)(policy, scale) for scale in (1.0, 3.0))
    by_loss = abs(float(scaled[0] / plain[0]) - 3)
    by_gradient = deviation(scaled[1], 3 * plain[1])
    return (
        by_loss < 1e-5 and by_gradient < 1e-7 and float(plain[0]) > 1,
        f"(λ_D, λ_U) times 3: loss {float(plain[0]):.3f} → {float(scaled[0]):.3f}; gradient within {by_gradient:.1e} "
        f"of 3 times as much (largest {float(jnp.max(jnp.abs(plain[1]))):.4f})",
    )


def contradictory_feedback_teaches_kto_nothing_and_dpo_indifference():
    logps = jnp.linspace(-60.0, -10.0, 5)

    def kto(logps):
        desirable = jnp.arange(10) < 5
        return jnp.mean(
            losses.kto_loss(jnp.concatenate([logps, logps]), jnp.full(10, -30.0), desirable, jnp.array(2.0))
        )

    def dpo(gap):
        forth, back = jnp.array([gap, 0.0]), jnp.array([0.0, gap])
        return jnp.mean(losses.dpo_loss(forth, back, jnp.zeros(2), jnp.zeros(2)))

    loss, gradient = jax.value_and_grad(kto)(logps)
    largest = deviation(gradient, jnp.zeros(5))
    slopes = [float(jax.grad(dpo)(gap)) for gap in (-20.0, -1.0, 0.0, 1.0, 20.0)]
    return (
        abs(float(loss) - 0.5) < 1e-6 and largest < 1e-8 and np.sign(slopes).tolist() == [-1, -1, 0, 1, 1],
        f"KTO loss {float(loss):.6f}, largest gradient {largest:.1e}; gradient of DPO where one reward leads by "
        f"−20, −1, 0, 1, 20 nats: {', '.join(f'{slope:+.4f}' for slope in slopes)}",
    )


def what_depends_on_the_prompt_alone_moves_kto_and_not_bradley_terry():
    rng = np.random.default_rng(7)
    chosen, rejected, reference = (jnp.array(x, jnp.float32) for x in rng.normal(0, 6, (3, 64)))
    shift = jnp.linspace(-8.0, 8.0, 64)

    def by_shift(loss):
        return loss(shift) - loss(jnp.zeros(64))

    bradley_terry = by_shift(lambda h: losses.bradley_terry_loss(chosen + h, rejected + h))
    dpo = by_shift(lambda h: losses.dpo_loss(chosen + h, rejected + h, reference, reference))
    kto = by_shift(lambda h: losses.kto_loss(chosen + h, reference, jnp.ones(64, bool), jnp.array(1.0)))
    still = max(deviation(x, jnp.zeros(64)) for x in (bradley_terry, dpo))
    away = jnp.abs(shift) > 1
    return (
        still < 1e-5 and bool(jnp.all((jnp.sign(kto) == -jnp.sign(shift))[away])),
        f"h(x) from −8 to 8: Bradley–Terry and DPO move by at most {still:.1e}, KTO from {float(kto[0]):+.3f} to "
        f"{float(kto[-1]):+.3f}",
    )


# (devices, microbatches).
LAYOUTS = [(1, 1), (2, 2), (4, 4), (8, 1), (1, 8), (8, 8)]


def z0_and_loss_are_those_of_the_whole_batch(size=64):
    matched = thumbs(8, size)
    rng = np.random.default_rng(8)
    unmatched = (*thumbs(9, size, spread=12.0)[:2], jnp.array(rng.random(size) < 0.9))
    ratios, where = np.asarray(unmatched[0] - unmatched[1], np.float64), np.asarray(unmatched[2])
    raw, rewards = ratios[where].mean(), 0.1 * np.abs(np.asarray(matched[0] - matched[1]))
    z0 = oracle.reference_point(*unmatched)
    expected, slopes = oracle.kto(*matched, z0, 0.1, 1.3, 0.8)
    worst = 0.0
    for num_devices, num_microbatches in LAYOUTS:
        got = in_parts(matched, unmatched, num_devices, num_microbatches)
        for value, right in zip(got, (z0, z0, expected.mean(), slopes / size), strict=True):
            worst = max(worst, deviation(value, right) / np.max(np.abs(right)))
    layouts = ", ".join(f"{d}×{m}" for d, m in LAYOUTS)
    # The mistake that this is about: z0 clamped in each microbatch, then averaged.
    parts = zip(np.split(ratios, 8), np.split(where, 8), strict=True)
    clamped = sum(max(0.0, part[w].mean()) * w.sum() for part, w in parts) / where.sum()
    wrong = oracle.kto(*matched, clamped, 0.1, 1.3, 0.8)[0].mean()
    return (
        worst < 2e-6
        and raw > 0.5
        and rewards.mean() > 0.1
        and clamped > 1.1 * z0
        and abs(wrong / expected.mean() - 1) > 1e-3,
        f"devices × microbatches {layouts}: z0 {z0:.4f}, loss {expected.mean():.4f}, with the gradient "
        f"within {worst:.1e} of float64 NumPy (raw KL {raw:+.3f}, mean |reward| {rewards.mean():.2f}); clamped in each "
        f"of 8 microbatches z0 would be {clamped:.4f} and the loss {wrong:.4f}. The step: tests/training/test_step.py",
    )


def in_parts(matched, unmatched, num_devices, num_microbatches):
    """z0 of microbatches' sums, z0 of their stacked log-probs, mean loss and its gradient, sharded over devices."""
    mesh = Mesh(np.array(jax.devices("cpu")[:num_devices]), "data")
    layout = NamedSharding(mesh, PartitionSpec(None, "data"))
    assert mesh.size == num_devices
    split = lambda x: jax.device_put(x.reshape(num_microbatches, -1), layout)  # noqa: E731

    @jax.jit
    def run(matched, unmatched):
        policy, reference, where = unmatched
        counts = jnp.sum(where, axis=1)
        means = jax.lax.map(lambda x: losses.kl_reference_point(x[0], x[1], where=x[2], clamp=False), unmatched)
        mean = jnp.sum(means * counts) / jnp.sum(counts)
        z0 = losses.kl_reference_point(mean, jnp.zeros(()))
        stacked = losses.kl_reference_point(policy, reference, where=where)

        def mean_loss(policy):
            sums = jax.lax.map(lambda x: jnp.sum(losses.kto_loss(*x, z0, **WEIGHTS)), (policy, *matched[1:]))
            return jnp.sum(sums) / policy.size

        return z0, stacked, *jax.value_and_grad(mean_loss)(matched[0])

    z0, stacked, loss, gradient = run(jax.tree.map(split, matched), jax.tree.map(split, unmatched))
    return z0, stacked, loss, gradient.reshape(-1)


def no_row_is_paired_with_its_own_prompt():
    rng = np.random.default_rng(9)
    num_pairs = num_own = num_left_out = 0
    for size in (2, 3, 5, 8, 64):
        neighbours = find_partners(np.arange(size)).tolist() == [(i + 1) % size for i in range(size)]
        if not neighbours:
            return False, f"{size} different prompts are not paired each with the next one"
        for num_prompts in (1, 2, 3, size):
            for _ in range(20):
                prompts = rng.integers(0, num_prompts, size)
                partners = find_partners(prompts)
                has_partner = partners >= 0
                num_pairs += has_partner.sum()
                num_own += (prompts[partners] == prompts)[has_partner].sum()
                num_left_out += (~has_partner).sum() if len(set(prompts.tolist())) > 1 else 0
    return (
        num_own == num_left_out == 0 and num_pairs > 1000,
        f"{num_pairs:,} pairs in batches of 2, 3, 5, 8 and 64 with prompts that repeat: {num_own} with its own prompt, "
        f"{num_left_out} left out although there was another prompt; with none repeated, j = (i + 1) mod m",
    )


# For each curve of the figure: where z > 0 and where z < 0, whether it bends down (−1), up (+1) or either (0).
BENDS = {"Kahneman–Tversky": (-1, 1), "KTO": (-1, 1), "DPO": (-1, -1), "SLiC": (-1, -1), "PPO-Clip": (0, 1)}
FLAT_ABOVE = {"SLiC": 1.0, "PPO-Clip": math.log(1.2)}


def value_curves_have_their_shapes():
    near = np.geomspace(1e-8, 1e-2, 61)
    gains = np.concatenate([[0.0], near, np.linspace(0.015, 6, 400)])
    holds, texts = {curve.name for curve in curves.CURVES} == set(BENDS), []
    for curve in curves.CURVES:
        bent, flat = BENDS[curve.name], FLAT_ABOVE.get(curve.name, math.inf)
        slopes = []
        for side, bend in zip((gains, -gains[::-1]), bent, strict=True):
            with jax.enable_x64(True):
                value = np.asarray(curve.value_fn(jnp.asarray(side)), np.float64)
            slope = np.diff(value) / np.diff(side)
            slopes.append(slope)
            # Rounding of values near 1 over steps of 1e-8 is of the order of 1e-7.
            holds &= bool(np.all(bend * np.diff(slope) >= -1e-6 * max(1, np.max(slope))))
            holds &= bend == 0 or bool(np.sum(bend * np.diff(slope)) > 0.04) or flat < math.inf
            holds &= bool(np.all(slope[side[1:] < flat] > 0)) and bool(np.all(slope[side[:-1] > flat] == 0))
        texts.append(f"{curve.name} {slopes[1][0]:.3f}, {slopes[1][-1]:.3f} | {slopes[0][0]:.3f}, {slopes[0][-1]:.3f}")
    return holds, f"slope at z = −6, −0 | +0, 6: {'; '.join(texts)}"


PROPERTIES: dict[str, Callable[[], tuple[bool, str]]] = {
    "1 at policy = reference z0 and rewards are 0, KTO's loss mean λ/2, DPO's ln 2": nothing_is_gained_at_the_reference,
    "2 losses by hand, β 0.1, z0 2": losses_are_those_worked_out_by_hand,
    "3 gradient ∓λβ σ(βz) σ(−βz), 37.6 times smaller at z = 50": the_gradient_is_the_formula_and_saturates,
    "4 the gradient is that with z0 held constant": no_gradient_flows_through_z0,
    "5 scaling both weights scales loss and gradient": weights_scale_loss_and_gradient,
    "6 contradictory feedback: KTO ½ without gradient, DPO drawn to equal rewards":
        contradictory_feedback_teaches_kto_nothing_and_dpo_indifference,
    "7 a reward of the prompt alone moves KTO, not Bradley–Terry":
        what_depends_on_the_prompt_alone_moves_kto_and_not_bradley_terry,
    "8 z0 and loss are the same on any mesh, in any microbatches": z0_and_loss_are_those_of_the_whole_batch,
    "9 no row is paired with its own prompt's completion": no_row_is_paired_with_its_own_prompt,
    "10 value curves: monotone, concave, convex and flat where they should be": value_curves_have_their_shapes,
}  # fmt: skip
