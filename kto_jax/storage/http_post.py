"""Requests by POST that are tried again while a failure may pass."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

TRIES = 5
_MAY_PASS = (408, 425, 429)


class PostError(Exception):
    """A request failed.

    Attributes:
      may_pass: whether the same request may succeed later.
    """

    def __init__(self, what: str, *, may_pass: bool) -> None:
        super().__init__(what)
        self.may_pass = may_pass


def post_json(
    url: str, content: bytes, *, token: str, seconds: float, wait: Callable[[float], object] = time.sleep
) -> bytes:
    """Sends JSON and returns the answer.

    Args:
      url: http:// or https://.
      content: the JSON.
      token: environment variable whose value, if there is one, is sent as a bearer token.
      seconds: of silence after which a request counts as failed.
      wait: waits a number of seconds before a request is repeated.

    Raises:
      PostError: the server refuses, or fails `TRIES` times; the message continues a sentence whose subject is the
        server.
    """
    headers = {"Content-Type": "application/json"}
    if os.environ.get(token):
        headers["Authorization"] = f"Bearer {os.environ[token]}"
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=seconds) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            failure = f"answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in _MAY_PASS:
                raise PostError(failure, may_pass=False) from None
        except (OSError, TimeoutError) as error:  # URLError is one
            failure = f"cannot be reached: {getattr(error, 'reason', error)}"
        if attempt + 1 < TRIES:
            wait(2.0**attempt)
    raise PostError(failure, may_pass=True)
