"""Hands a policy over to the server that samples, by a command of the user's, and checks that it samples from it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kto_jax.config import ConfigError, TransientError

_SECONDS = 3600.0


def hand_over(command: str, folder: Path, timeout: float = _SECONDS) -> None:
    """Calls the command with the folder of the policy as its last argument, and waits until it ends.

    Args:
      command: words as a shell splits them; no shell runs them.
      folder: a Hugging Face directory.
      timeout: seconds.

    Raises:
      ConfigError: the command cannot be started.
      TransientError: it fails, or takes longer.
    """
    again = "The policy is kept. Run the same command again once the server takes it."
    try:
        result = subprocess.run(
            [*shlex.split(command), str(folder.resolve())], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise TransientError(f"--hand_over={command} took more than {timeout:g} seconds. {again}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--hand_over={command} cannot be started: {error}. It is a program and its arguments, to which the "
            "folder of the policy is added. Correct --hand_over."
        ) from error
    if result.returncode:
        said = " ".join((result.stderr or result.stdout).split())[-200:]
        raise TransientError(f"--hand_over={command} ended with exit code {result.returncode}: {said}. {again}")


def check_gap(figures: Mapping[str, Sequence[np.ndarray]], most: float, url: str) -> None:
    """Refuses a round that was sampled from a policy too far from the one that is trained.

    Args:
      figures: of each completion, the server's sampled_logps and the trainer's old_logps.
      most: nats per token, in the mean.
      url: of the server.

    Raises:
      ConfigError: with the gap.
    """
    old, sampled = (np.concatenate(figures[name]).astype(np.float64) for name in ("old_logps", "sampled_logps"))
    gap = float(np.abs(old - sampled).mean())
    if not gap <= most:
        raise ConfigError(
            f"--sample_from={url} and the trainer differ by {gap:.2g} nats per token, more than --max_gap={most:g}. "
            "The server then samples from another model, another temperature or an older policy. Check --hand_over, "
            "lower --hand_over_every or config.optimizer.learning_rate, or raise --max_gap."
        )
