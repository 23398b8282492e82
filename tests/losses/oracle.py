"""Independent float64 NumPy versions of the losses, from the formulas of the papers, with analytic gradients."""

import numpy as np


def sigmoid(z):
    z = np.asarray(z, np.float64)
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))


def kto(policy, reference, desirable, z0, beta, desirable_weight, undesirable_weight):
    """Losses of equation (7) and their gradients with respect to the policy's log-probabilities, equation (9)."""
    losses, gradients = [], []
    for log_policy, log_reference, good in zip(policy, reference, desirable, strict=True):
        r = np.float64(log_policy) - np.float64(log_reference)
        weight = desirable_weight if good else undesirable_weight
        argument = beta * (r - z0) if good else beta * (z0 - r)
        losses.append(weight - weight * sigmoid(argument))
        slope = weight * beta * sigmoid(argument) * sigmoid(-argument)
        gradients.append(-slope if good else slope)
    return np.array(losses), np.array(gradients)


def reference_point(policy, reference, where):
    """z0: mean log-ratio of the pairs that count, clamped at 0."""
    ratios = [np.float64(p) - np.float64(q) for p, q, w in zip(policy, reference, where, strict=True) if w]
    return max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0


def token_logps(hidden, head, targets, softcap=None, bias=None):
    """log softmax(hidden @ head)[target] for every token."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    shifted = logits - logits.max(-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(-1))
    return shifted[np.arange(len(targets)), targets] - normalizer


# Below, every loss comes with its gradients: (losses, (d loss_i / d first argument_i, d loss_i / d second ..., ...)),
# for the policy's arguments alone. Formulas: see the papers named in kto_jax/losses.


def log_sigmoid(z):
    z = np.asarray(z, np.float64)
    return np.minimum(z, 0) - np.log1p(np.exp(-np.abs(z)))


def wide(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


def exp_bounded(x):
    """e^x with x kept within ±20, and its derivative by x."""
    value = np.exp(np.clip(x, -20, 20))
    return value, np.where(np.abs(x) < 20, value, 0)


# Value functions: (v, dv/dz).


def value_sigmoid(z):
    return sigmoid(z), sigmoid(z) * sigmoid(-z)


def value_log_sigmoid(z):
    return log_sigmoid(z), sigmoid(-z)


def value_identity(z):
    return z, np.ones_like(z)


def value_kahneman_tversky(z, alpha=0.88, aversion=2.25):
    values, slopes = np.empty_like(z), np.empty_like(z)
    for i, x in enumerate(z):
        scale = aversion if x < 0 else 1.0
        if abs(x) < 1e-6:
            slopes[i] = scale * 1e-6**alpha / 1e-6
            values[i] = slopes[i] * x
        else:
            values[i] = scale * np.sign(x) * abs(x) ** alpha
            slopes[i] = scale * alpha * abs(x) ** (alpha - 1)
    return values, slopes


def value_slic(z, margin=1.0):
    return np.where(z < margin, z - margin, 0), np.where(z < margin, 1.0, 0.0)


# Single completions.


def kto_with_value(
    policy, reference, desirable, value, z0=4.25, beta=0.1, desirable_weight=1.3, undesirable_weight=0.8
):
    policy, reference = wide(policy, reference)
    sign = np.where(desirable, 1.0, -1.0)
    weight = np.where(desirable, desirable_weight, undesirable_weight)
    v, slope = value(sign * beta * (policy - reference - z0))
    return weight * (1 - v), (-weight * sign * beta * slope,)


def simple_kto(policy, reference, desirable, beta=0.1):
    """Each completion against the clamped mean log-ratio of the other class, taken as a constant."""
    policy, reference = wide(policy, reference)
    ratios = policy - reference
    means = {label: max(0.0, ratios[desirable == label].mean()) if np.any(desirable == label) else 0.0
             for label in (True, False)}  # fmt: skip
    sign = np.where(desirable, 1.0, -1.0)
    z = sign * beta * (ratios - np.array([means[not label] for label in desirable]))
    return sigmoid(-z), (-sign * beta * sigmoid(z) * sigmoid(-z),)


def apo_zero_unpaired(policy, reference, desirable, beta=0.1):
    policy, reference = wide(policy, reference)
    p = sigmoid(beta * (policy - reference))
    slope = beta * p * sigmoid(-beta * (policy - reference))
    return np.where(desirable, sigmoid(-beta * (policy - reference)), p), (np.where(desirable, -slope, slope),)


def bco(policy, reference, desirable, delta=0.6, beta=0.1):
    policy, reference = wide(policy, reference)
    sign = np.where(desirable, 1.0, -1.0)
    z = sign * (beta * (policy - reference) - delta)
    return -log_sigmoid(z), (-sign * beta * sigmoid(-z),)


def humanline(ratios, low=-1.0, high=1.5):
    (ratios,) = wide(ratios)
    return np.clip(ratios, low, high), (((ratios > low) & (ratios < high)).astype(np.float64),)


def sft(logps, lengths):
    logps, lengths = wide(logps, lengths)
    return -logps / lengths, (-1 / lengths,)


# Pairs.


def implied_reward(u, divergence, alpha):
    """f'(ratio) shifted to 0 at u = 0, and its derivative by u."""
    if divergence == "forward_kl":
        e, slope = exp_bounded(-u)
        return 1 - e, slope
    if divergence == "js":
        return np.log(2) + log_sigmoid(u), sigmoid(-u)
    if divergence == "alpha":
        e, slope = exp_bounded((alpha - 1) * u)
        return (e - 1) / (alpha - 1), slope
    return u, np.ones_like(u)


def dpo(pc, pr, rc, rr, lc=None, lr=None, *, variant="sigmoid", beta=0.1, eps=0.0, delta=0.0,
        divergence="reverse_kl", alpha=0.5):  # fmt: skip
    pc, pr, rc, rr = wide(pc, pr, rc, rr)
    w, slope_w = implied_reward(pc - rc, divergence, alpha)
    l, slope_l = implied_reward(pr - rr, divergence, alpha)  # noqa: E741
    loss, by_w, by_l = DPO[variant](w, l, beta, eps, delta, lc, lr)
    return loss, (by_w * slope_w, by_l * slope_l)


def of_difference(function):
    """A loss of z = β(w − l), given with its derivative by z, as one of w and l."""

    def loss(w, l, beta, eps, *_):  # noqa: E741
        value, slope = function(beta * (w - l), eps)
        return value, beta * slope, -beta * slope

    return loss


def dpo_ipo(w, l, beta, eps, delta, lc, lr):  # noqa: E741
    lc, lr = wide(lc, lr)
    inner = w / lc - l / lr - 0.5 / beta
    return inner**2, 2 * inner / lc, -2 * inner / lr


def dpo_exo(z, eps):
    eps = eps or 1e-3
    p, q = sigmoid(z), sigmoid(-z)
    loss = p * (log_sigmoid(z) - np.log(1 - eps)) + q * (log_sigmoid(-z) - np.log(eps))
    return loss, p * q * (z + np.log(eps) - np.log(1 - eps))


def dpo_nca(w, l, beta, *_):  # noqa: E741
    loss = -log_sigmoid(beta * w) - 0.5 * log_sigmoid(-beta * w) - 0.5 * log_sigmoid(-beta * l)
    return loss, beta * (-sigmoid(-beta * w) + 0.5 * sigmoid(beta * w)), 0.5 * beta * sigmoid(beta * l)


def dpo_bco(w, l, beta, eps, delta, *_):  # noqa: E741
    a, b = beta * w - delta, beta * l - delta
    return -log_sigmoid(a) - log_sigmoid(-b), -beta * sigmoid(-a), beta * sigmoid(b)


def dpo_sppo(w, l, beta, *_):  # noqa: E741
    a, b = w - 0.5 / beta, l + 0.5 / beta
    return a**2 + b**2, 2 * a, 2 * b


def dpo_apo_zero(w, l, beta, *_):  # noqa: E741
    pw, pl = sigmoid(beta * w), sigmoid(beta * l)
    return sigmoid(-beta * w) + pl, -beta * pw * sigmoid(-beta * w), beta * pl * sigmoid(-beta * l)


def dpo_apo_down(w, l, beta, *_):  # noqa: E741
    at_w = beta * sigmoid(beta * w) * sigmoid(-beta * w)
    at_gap = beta * sigmoid(beta * (w - l)) * sigmoid(beta * (l - w))
    return sigmoid(beta * w) + sigmoid(beta * (l - w)), at_w - at_gap, at_gap


DPO = {
    "sigmoid": of_difference(
        lambda z, e: (-(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z), -(1 - e) * sigmoid(-z) + e * sigmoid(z))
    ),
    "robust": of_difference(
        lambda z, e: (
            (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
            (-(1 - e) * sigmoid(-z) - e * sigmoid(z)) / (1 - 2 * e),
        )
    ),
    "hinge": of_difference(lambda z, e: (np.maximum(0, 1 - z), np.where(z < 1, -1.0, 0.0))),
    "ipo": dpo_ipo,
    "exo_pair": of_difference(dpo_exo),
    "nca_pair": dpo_nca,
    "bco_pair": dpo_bco,
    "sppo_hard": dpo_sppo,
    "apo_zero": dpo_apo_zero,
    "apo_down": dpo_apo_down,
}


def log_utility(pc, pr, rc, rr, z0=4.25, beta=0.1, desirable_weight=1.3, undesirable_weight=0.8, as_printed=False):
    pc, pr, rc, rr = wide(pc, pr, rc, rr)
    a, b = beta * (pc - rc - z0), beta * (z0 - (pr - rr))
    flip = -1.0 if as_printed else 1.0
    utility = desirable_weight * sigmoid(a) + flip * undesirable_weight * sigmoid(b)
    by_utility = -sigmoid(-utility)
    by_chosen = by_utility * desirable_weight * beta * sigmoid(a) * sigmoid(-a)
    by_rejected = -flip * by_utility * undesirable_weight * beta * sigmoid(b) * sigmoid(-b)
    return -log_sigmoid(utility), (by_chosen, by_rejected)


def orpo(chosen, rejected, weight=0.1):
    chosen, rejected = wide(chosen, rejected)
    c, r = np.minimum(chosen, -1e-6), np.minimum(rejected, -1e-6)
    gap = np.log(np.exp(c) / (1 - np.exp(c))) - np.log(np.exp(r) / (1 - np.exp(r)))
    by_gap = -weight * sigmoid(-gap)
    by_chosen = np.where(chosen < -1e-6, by_gap / (1 - np.exp(c)), 0) - 1
    by_rejected = np.where(rejected < -1e-6, -by_gap / (1 - np.exp(r)), 0)
    return -chosen - weight * log_sigmoid(gap), (by_chosen, by_rejected)


def simpo(chosen, rejected, beta=2.0, margin=1.0):
    chosen, rejected = wide(chosen, rejected)
    z = beta * (chosen - rejected) - margin
    return -log_sigmoid(z), (-beta * sigmoid(-z), beta * sigmoid(-z))


def cpo(chosen, rejected, chosen_mean, beta=0.1, weight=1.0):
    chosen, rejected, chosen_mean = wide(chosen, rejected, chosen_mean)
    slope = beta * sigmoid(-beta * (chosen - rejected))
    loss = -log_sigmoid(beta * (chosen - rejected)) - weight * chosen_mean
    return loss, (-slope, slope, np.full_like(slope, -weight))


def slic(chosen, rejected, chosen_mean, margin=1.0, weight=0.1):
    chosen, rejected, chosen_mean = wide(chosen, rejected, chosen_mean)
    short = margin - chosen + rejected
    slope = np.where(short > 0, 1.0, 0.0)
    return np.maximum(0, short) - weight * chosen_mean, (-slope, slope, np.full_like(slope, -weight))


def bradley_terry(chosen, rejected, margin=0.0, centring=0.0):
    chosen, rejected = wide(chosen, rejected)
    z, total = chosen - rejected - margin, chosen + rejected
    gradients = -sigmoid(-z) + 2 * centring * total, sigmoid(-z) + 2 * centring * total
    return -log_sigmoid(z) + centring * total**2, gradients


# Tokens.


def ppo_clip(logps, old, advantages, where, low=0.2, high=0.2):
    """A token teaches unless its ratio has left [1 − low, 1 + high] to the side that its advantage wants."""
    logps, old, advantages = wide(logps, old, advantages)
    ratio, slope = exp_bounded(logps - old)
    beyond = np.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    bound = np.where(advantages > 0, 1 + high, 1 - low)
    losses = np.where(where, -advantages * np.where(beyond, bound, ratio), 0)
    return losses, (np.where(where & ~beyond, -advantages * slope, 0),)


def ppo_value(values, old, returns, where, clip=0.2):
    values, old, returns = wide(values, old, returns)
    clipped = np.where(values > old + clip, old + clip, np.where(values < old - clip, old - clip, values))
    plain, limited = (values - returns) ** 2, (clipped - returns) ** 2
    gradient = np.where(limited > plain, 0, values - returns)
    return np.where(where, 0.5 * np.maximum(plain, limited), 0), (np.where(where, gradient, 0),)


def k3(logps, reference, where):
    """Constant from a difference of 20 nats on."""
    logps, reference = wide(logps, reference)
    difference = np.minimum(reference - logps, 20)
    e, slope = exp_bounded(difference)
    gradient = np.where(difference < 20, 1 - slope, 0)
    return np.where(where, e - difference - 1, 0), (np.where(where, gradient, 0),)


def grpo(logps, old, reference, advantages, where, low=0.2, high=0.2, kl_weight=0.04):
    surrogate, (surrogate_gradient,) = ppo_clip(logps, old, advantages, where, low, high)
    kl, (kl_gradient,) = k3(logps, reference, where)
    return surrogate + kl_weight * kl, (surrogate_gradient + kl_weight * kl_gradient,)


def generalized_advantages(rewards, values, where, discount=1.0, trace=0.95):
    """The definition: A_t = Σ_k (γλ)^k (r + γ V_next − V) at the k-th later token that counts."""
    rewards, values = wide(rewards, values)
    result = np.zeros_like(rewards)
    for row in range(len(rewards)):
        counted = [t for t in range(rewards.shape[1]) if where[row, t]]
        following = [*(values[row, t] for t in counted[1:]), 0.0]
        errors = [rewards[row, t] + discount * n - values[row, t] for t, n in zip(counted, following, strict=True)]
        for i, t in enumerate(counted):
            result[row, t] = sum((discount * trace) ** k * error for k, error in enumerate(errors[i:]))
    return result, ()


def group_relative(rewards, epsilon=1e-4):
    (rewards,) = wide(rewards)
    return np.stack([(group - np.mean(group)) / (np.std(group) + epsilon) for group in rewards]), ()


def leave_one_out(rewards):
    (rewards,) = wide(rewards)
    return np.stack([[r - np.mean(np.delete(group, i)) for i, r in enumerate(group)] for group in rewards]), ()


# ------------------------------------------------------------------------------------------------ routers


def router_losses(routed, num_tokens):
    """E Σ_e f_e P_e and the mean squared normaliser, layer by layer, expert by expert."""
    layers, experts = routed.counts.shape
    balance = 0.0
    for expert in range(experts):
        chosen = sum(np.float64(routed.counts[layer, expert]) for layer in range(layers))
        probability = sum(np.float64(routed.probabilities[layer, expert]) for layer in range(layers))
        balance += experts * chosen * probability / (layers * num_tokens) ** 2
    return balance, sum(np.float64(each) for each in routed.squared_normalizers) / (layers * num_tokens)
