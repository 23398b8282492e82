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
