"""A simple KTO: a row for each example, padded to the longest, and all logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.jax_turn import load_policy, take_turn
from benchmarks.peers.turn import read_job
from kto_jax.losses import kl_reference_point, kto_loss
from kto_jax.models.model import Model, Params


def pad(sequences: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """Prompts and completions as rows [B, L], L the longest one's length, rounded up to a multiple of 8."""
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    shape = (len(sequences), -(-longest // 8) * 8)
    rows = {"tokens": np.zeros(shape, np.int32), "real": np.zeros(shape, np.int32), "completion": np.zeros(shape, bool)}
    for i, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        rows["tokens"][i, :end] = prompt + completion
        rows["real"][i, :end] = 1
        rows["completion"][i, len(prompt) : end] = True
    return rows


def completion_logps(model: Model, params: Params, rows: dict[str, Any]) -> jax.Array:
    """Log-probability of each completion, in nats [B]."""
    positions = jnp.broadcast_to(jnp.arange(rows["tokens"].shape[1])[None], rows["tokens"].shape)
    hidden = model.hidden_states(params, rows["tokens"], rows["real"], positions)
    token_logps = jax.nn.log_softmax(model.logits(params, hidden[:, :-1]))
    logps = jnp.take_along_axis(token_logps, rows["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(rows["completion"][:, 1:], logps, 0), axis=1)


def main() -> None:
    """Runs the job."""
    job = read_job()
    _, model, policy = load_policy(job, job["plain_remat"])
    options, settings = job["config"]["objective"], job["config"]["optimizer"]
    weights = {name: options[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings["clip_norm"]),
        optax.adamw(settings["learning_rate"], b2=settings["b2"], weight_decay=settings["weight_decay"]),
    )

    def step(state, batch):
        policy, reference, opt_state = state
        policy_kl, reference_kl = (completion_logps(model, params, batch["unmatched"]) for params in state[:2])
        z0 = kl_reference_point(policy_kl, reference_kl)
        reference_logps = completion_logps(model, reference, batch["matched"])

        def mean_loss(policy):
            policy_logps = completion_logps(model, policy, batch["matched"])
            return jnp.mean(kto_loss(policy_logps, reference_logps, batch["desirable"], z0, **weights))

        loss, gradient = jax.value_and_grad(mean_loss)(policy)
        updates, opt_state = optimizer.update(gradient, opt_state, policy)
        return (optax.apply_updates(policy, updates), reference, opt_state), {"loss": loss}

    batches = [
        {name: pad(rows[name]) for name in ("matched", "unmatched")} | {"desirable": np.array(rows["desirable"])}
        for rows in job["rows"]
    ]
    batches = [jax.device_put(batch) for batch in batches]
    state = (policy, jax.tree.map(jnp.copy, policy), optimizer.init(policy))
    take_turn(job, jax.jit(step, donate_argnums=0), state, batches)


if __name__ == "__main__":
    main()
