"""Keeps secrets out of a configuration, which is copied to config.json, to trackers and to reports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config.errors import ConfigError

_SECRETS = {
    "a token of the Hugging Face Hub": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "an access key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a user and password": r"://[^/@\s]*:[^/@\s]+@",
    "a signed URL": r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig|token|access_token|api_key)=",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


def check_no_secrets(values: Mapping[str, Any], path: str) -> None:
    """Refuses a configuration, or flags, that hold a secret.

    Args:
      values: nested.
      path: their name in the error, which does not repeat the secret.

    Raises:
      ConfigError: naming the field.
    """
    for name, text in _texts(values, path):
        for kind, pattern in _SECRETS.items():
            if re.search(pattern, text, re.IGNORECASE if kind == "a signed URL" else 0):
                raise ConfigError(
                    f"{name} holds {kind}. It would be copied to config.json, to trackers and to the report. Secrets "
                    "are read from the environment alone, such as HF_TOKEN. Remove it, and revoke it if others saw it."
                )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield path, str(name)
            yield from _texts(part, f"{path}.{name}" if name and len(str(name)) < 40 else path)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, path)
