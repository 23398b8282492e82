"""A language model as judge, behind OpenAI's chat API: hosted, or served by vLLM, llama.cpp, Ollama and others.

Every pair is asked about in both orders. Answers are kept in the cache: a command that is run again, or was
interrupted, asks only what it has no answer to. The key is read from OPENAI_API_KEY.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kto_jax.config import ConfigError, TransientError
from kto_jax.config.packages import require
from kto_jax.evaluation.completions import Answer
from kto_jax.storage.atomic import write_json
from kto_jax.storage.folders import cache_directory, cache_folder, reporting_write_errors

INSTRUCTIONS = (
    "You compare two answers to the same prompt. The better answer is more correct, more helpful and clearer. Neither "
    "its length nor its place counts. Think briefly, then end with one line that holds nothing but [[A>B]] if answer A "
    "is better, [[B>A]] if answer B is better, or [[A=B]] if they are equally good."
)
_VERDICT = re.compile(
    r"\[\[\s*(?:(A\s*>+\s*B|B\s*<+\s*A|A)|(B\s*>+\s*A|A\s*<+\s*B|B)|(A\s*=\s*B|B\s*=\s*A|C|TIE))\s*\]\]", re.I
)
_MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504)
_CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A language model behind OpenAI's chat API.

    Attributes:
      url: up to and including /v1.
      model: its name there; empty for servers of one model.
      instructions: what the judge is told to do.
      max_tokens: longest answer.
      parallel: questions asked at once.
      attempts: how often a question is asked before the command gives up.
      timeout: seconds that an answer may take.
      first_wait: seconds between the first two attempts, about; each wait is twice as long as the one before, unless
        the server says otherwise.
    """

    url: str = ""
    model: str = ""
    instructions: str = INSTRUCTIONS
    max_tokens: int = 512
    parallel: int = 8
    attempts: int = 6
    timeout: float = 120.0
    first_wait: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What judging takes at most; answers that are cached take nothing.

    Attributes:
      questions: two for each pair.
      tokens_in: of all questions, estimated at four characters a token.
      tokens_out: of all answers, if each is as long as allowed.
    """

    questions: int
    tokens_in: int
    tokens_out: int

    def dollars(self, prices: Sequence[float]) -> float:
        """The cost at prices per million tokens, in and out."""
        return (self.tokens_in * prices[0] + self.tokens_out * prices[1]) / 1e6


def estimate_cost(endpoint: Endpoint, prompts: Sequence[Any], num_samples: int, max_new_tokens: int) -> Cost:
    """The most that judging completions of some prompts can take, before they are written."""
    questions = 2 * len(prompts) * num_samples
    fixed = len(endpoint.instructions) / _CHARACTERS_PER_TOKEN + 2 * max_new_tokens + 40
    written = sum(len(_shown(prompt)) for prompt in prompts) / _CHARACTERS_PER_TOKEN * num_samples * 2
    return Cost(questions, round(questions * fixed + written), questions * endpoint.max_tokens)


def ask_in_both_orders(
    endpoint: Endpoint, evaluated: Sequence[Answer], baseline: Sequence[Answer]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """The evaluated model's share of each win, shown first and shown second; NaN where no verdict could be read.

    Raises:
      ConfigError: the endpoint refuses the questions.
      TransientError: it cannot be reached, or fails again and again.
    """
    require("requests", "a language model as judge", "choose another judge")
    pairs = list(zip(evaluated, baseline, strict=True))
    first = [question(endpoint, ours.prompt, ours.text, theirs.text) for ours, theirs in pairs]
    second = [question(endpoint, ours.prompt, theirs.text, ours.text) for ours, theirs in pairs]
    told = _ask_all(endpoint, [*first, *second])
    verdicts = np.asarray([math.nan if share is None else share for share in map(read_verdict, told)], float)
    return verdicts[: len(pairs)], 1 - verdicts[len(pairs) :]


def question(endpoint: Endpoint, prompt: Any, a: str, b: str) -> dict[str, Any]:
    """The body of a request that asks which of two completions is better."""
    text = f"<prompt>\n{_shown(prompt)}\n</prompt>\n\n<answer_A>\n{a}\n</answer_A>\n\n<answer_B>\n{b}\n</answer_B>"
    messages = [{"role": "system", "content": endpoint.instructions}, {"role": "user", "content": text}]
    named = {"model": endpoint.model} if endpoint.model else {}
    return {**named, "messages": messages, "temperature": 0, "max_tokens": endpoint.max_tokens}


def read_verdict(text: str) -> float | None:
    """A's share of the win by the last verdict in an answer, such as [[A>B]]; None if there is none."""
    found = list(_VERDICT.finditer(text))
    if not found:
        return None
    a_wins, b_wins, _ = found[-1].groups()
    return 1.0 if a_wins else 0.0 if b_wins else 0.5


def _shown(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _ask_all(endpoint: Endpoint, bodies: Sequence[dict[str, Any]]) -> list[str]:
    """The answer to each question, cached or asked for; equal questions are asked once."""
    known = {name: _recall(name) for name in (_name_of(endpoint, body) for body in bodies)}
    missing = {name: body for body in bodies if known[name := _name_of(endpoint, body)] is None}
    with _session(endpoint) as session, concurrent.futures.ThreadPoolExecutor(endpoint.parallel) as pool:
        asked = {name: pool.submit(_ask, session, endpoint, name, body) for name, body in missing.items()}
        try:
            for name, future in asked.items():
                known[name] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [known[_name_of(endpoint, body)] or "" for body in bodies]


def _session(endpoint: Endpoint) -> Any:
    """A session that asks again where that may help, waiting longer each time or as long as the server says."""
    import requests
    import urllib3

    again = urllib3.Retry(
        total=endpoint.attempts - 1, backoff_factor=endpoint.first_wait, backoff_jitter=endpoint.first_wait,
        status_forcelist=_MAY_PASS, allowed_methods=None, raise_on_status=False,
    )  # fmt: skip
    session = requests.Session()
    adapter = requests.adapters.HTTPAdapter(max_retries=again, pool_maxsize=endpoint.parallel)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    if key := os.environ.get("OPENAI_API_KEY"):
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def _ask(session: Any, endpoint: Endpoint, name: str, body: dict[str, Any]) -> str:
    """Asks one question and keeps the answer."""
    import requests

    try:
        found = session.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=body, timeout=endpoint.timeout)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _failure(endpoint, str(error)[:200], may_pass=True) from error
    except requests.RequestException as error:
        raise _failure(endpoint, str(error)[:200], may_pass=False) from error
    if not found.ok:
        raise _failure(endpoint, f"{found.status_code}: {found.text[:200]}", may_pass=found.status_code in _MAY_PASS)
    text = _text_of(endpoint, found)
    path = _path_of(name)
    cache_folder("verdicts", name[:2])
    with reporting_write_errors(path):
        write_json(path, {"question": body, "answer": text})
    return text


def _failure(endpoint: Endpoint, what: str, *, may_pass: bool) -> Exception:
    if may_pass:
        return TransientError(
            f"the judge at {endpoint.url} failed {endpoint.attempts} times ({what}). Its answers so far are kept. Run "
            "the same command again when it answers."
        )
    return ConfigError(
        f"the judge at {endpoint.url} refused a question ({what}). It must be an endpoint of OpenAI's chat API, such "
        "as http://127.0.0.1:8000/v1; its key is read from OPENAI_API_KEY. Correct --judge, --judge_model or the key."
    )


def _text_of(endpoint: Endpoint, response: Any) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"the judge at {endpoint.url} answered {response.text[:200]!r}. It must answer as OpenAI's chat API does, "
            "with choices. Correct --judge."
        ) from None
    return content if isinstance(content, str) else ""


def _name_of(endpoint: Endpoint, body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([endpoint.url, body], sort_keys=True).encode()).hexdigest()


def _path_of(name: str) -> Path:
    return cache_directory() / "verdicts" / name[:2] / f"{name}.json"


def _recall(name: str) -> str | None:
    """The cached answer to a question; a file that cannot be read counts as none."""
    try:
        return str(json.loads(_path_of(name).read_text(encoding="utf-8"))["answer"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
