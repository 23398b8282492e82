"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kto_jax.config import ConfigError, TransientError
from kto_jax.storage.hub import may_pass

TOKEN = "HF_TOKEN"
"""The environment variable with the token; it is never a flag, which others on the machine would see."""


def push_folder(folder: Path, repository: str) -> str:
    """Uploads a folder as one commit to a repository, which is created as a private one if it does not exist.

    Returns:
      The address of the commit.

    Raises:
      ConfigError: there is no token, or the Hub refuses the repository.
      TransientError: the Hub cannot be reached.
    """
    token = os.environ.get(TOKEN, "")
    if not token or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        given = f"--push={repository}" if token else f"--push={repository} without the environment variable {TOKEN}"
        raise ConfigError(
            f"{given} cannot be uploaded. Allowed: a repository org/name, and a token with write access in {TOKEN}. "
            "Create one at the Hub's settings and export it, or leave --push out."
        )
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        found = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from kto_jax.export")
    except Exception as error:  # The Hub's client lets through the errors of its HTTP library.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if may_pass(error):
            raise TransientError(
                f"{folder} was not uploaded: the Hub cannot be reached ({reason}). Run the same command again later."
            ) from error
        raise ConfigError(
            f"{folder} was not uploaded to {repository}: {reason}. The token in {TOKEN} needs write access to it. "
            "Check both at the Hub."
        ) from error
    return str(found.commit_url)
