"""Models that answer on the chat page through an endpoint as OpenAI has it: /chat/completions, streamed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.thumbs.models import Messages, Piece, Settings, whole_characters

KEY = "OPENAI_API_KEY"
"""Variable of the environment with the endpoint's key, if it wants one."""
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 300.0
_LONGEST = 300


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model of a server.

    Attributes:
      url: the server's base, such as http://127.0.0.1:8000/v1.
      name: what the server calls the model.
    """

    url: str
    name: str

    def stream(self, messages: Messages, settings: Settings, seed: int) -> Iterator[Piece]:
        """See `kto_jax.thumbs.models.Answering`."""
        import httpx

        body = {
            "model": self.name,
            "messages": list(messages),
            "temperature": settings.temperature,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
            "stream": True,
        }
        try:
            with _client() as client, client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                _check(response, self.url)
                yield from _pieces(response, self.url)
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error


def open_endpoint(url: str, name: str) -> Endpoint:
    """Finds a server's model.

    Args:
      url: the server's base, with or without /chat/completions.
      name: the model; "" if the server has only one.

    Raises:
      ConfigError: the address is none, the server refuses, or it has several models and none is named.
      TransientError: the server cannot be reached.
    """
    require("httpx", "--endpoint", "name a --model of this machine")
    import httpx

    base = url.rstrip("/").removesuffix("/chat/completions")
    if not base.startswith(("http://", "https://")):
        raise ConfigError(
            f"--endpoint={url} is no address. Allowed: the base of a server, such as http://127.0.0.1:8000/v1. Set "
            "--endpoint."
        )
    if name:
        return Endpoint(base, name)
    try:
        with _client() as client:
            response = client.get(f"{base}/models")
            _check(response, base)
    except httpx.HTTPError as error:
        raise _unreachable(base, error) from error
    try:
        listed = response.json()
    except ValueError as error:
        raise ConfigError(
            f"{base}/models answers something that is no JSON. Allowed: an endpoint as OpenAI has it, whose base often "
            "ends in /v1. Correct --endpoint."
        ) from error
    models = listed.get("data") if isinstance(listed, Mapping) else None
    names = [str(model["id"]) for model in models or [] if isinstance(model, Mapping) and "id" in model]
    if len(names) != 1:
        found = ", ".join(names[:12]) or "none"
        raise ConfigError(f"{base} has {len(names)} models: {found}. One answers here. Set --endpoint_model.")
    return Endpoint(base, names[0])


def _client() -> Any:
    import httpx

    key = os.environ.get(KEY, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(headers=headers, timeout=httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS))


def _check(response: Any, url: str) -> None:
    """Raises for an answer that is an error."""
    if response.status_code < 400:
        return
    response.read()
    said = f"{url} answers with status {response.status_code}: {' '.join(response.text.split())[:_LONGEST]}"
    if response.status_code in (401, 403):
        raise ConfigError(f"{said}. The server wants a key. Set the variable {KEY} of the environment.")
    if response.status_code in (408, 425, 429) or response.status_code >= 500:
        raise TransientError(f"{said}. The server may answer later. Try again.")
    raise ConfigError(f"{said}. Check --endpoint, --endpoint_model and the settings.")


def _unreachable(url: str, error: Exception) -> TransientError:
    return TransientError(
        f"{url} cannot be reached, or stopped answering: {type(error).__name__}: {str(error)[:_LONGEST]}. The server "
        "must run and listen there. Check --endpoint, and try again."
    )


def _pieces(response: Any, url: str) -> Iterator[Piece]:
    """The answer so far, from a stream of events or from one object of a server that does not stream."""
    text, num_pieces, ended, whole = "", 0, False, ""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            whole += line if line.lstrip().startswith("{") or whole else ""
            continue
        if (data := line.removeprefix("data:").strip()) == "[DONE]":
            break
        content, reason = _content(data, url)
        ended = ended or reason == "stop"
        if content:
            text, num_pieces = text + content, num_pieces + 1
            yield Piece(whole_characters(text), num_pieces, ended)
    if whole and not text:
        text, reason = _content(whole, url)
        ended = reason == "stop"
    yield Piece(whole_characters(text), num_pieces, ended)


def _content(data: str, url: str) -> tuple[str, str]:
    """The text of an event, and why the answer ended.

    Raises:
      TransientError: the event is an error, or none that is known.
    """
    try:
        event = json.loads(data)
        if event.get("error"):
            raise TransientError(f"{url} reports an error: {str(event['error'])[:_LONGEST]}. Try again.")
        choice = (event.get("choices") or [{}])[0]
        said = choice.get("delta") or choice.get("message") or {}
        return str(said.get("content") or ""), str(choice.get("finish_reason") or "")
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise TransientError(
            f"{url} sends something that is no answer: {data[:_LONGEST]!r}. Allowed: chat completions as OpenAI has "
            "them. Check --endpoint, and try again."
        ) from error
