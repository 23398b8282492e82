"""Completions from a server that answers as vLLM's /v1/completions does: token ids in, token ids and their
log-probabilities out.

    POST URL/completions   {"model": ..., "prompt": [ids], "n": ..., "max_tokens": ..., "temperature": ..., "top_p": 1,
                            "top_k": -1, "min_p": 0, "repetition_penalty": 1, "logprobs": 1, "return_token_ids": true}
    answer                 {"choices": [{"index": 0, "token_ids": [...], "finish_reason": "stop" or "length",
                                         "logprobs": {"token_logprobs": [...]}}, ...]}

Settings that change the distribution are sent even where they change nothing: vLLM takes those that are missing from
the model's generation_config.json. Answers are kept in a file as they come: a run that is resumed asks for none twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError, TransientError
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.sampling.complete import Completion, LanguageModel, Prompt
from kto_jax.sampling.sample import Sampling, check_prompts
from kto_jax.storage.answers import Answers, ask_all
from kto_jax.storage.http_post import TRIES, PostError, post_json

TOKEN = "KTO_JAX_SAMPLER_TOKEN"
"""Environment variable whose value is sent as a bearer token."""
_AT_ONCE = 16
_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class SamplingEndpoint:
    """A server that samples.

    Attributes:
      url: its base, such as http://127.0.0.1:8000/v1.
      name: what it calls the model.
      wait: waits a number of seconds before a request is repeated.
    """

    url: str
    name: str
    wait: Callable[[float], object] = time.sleep

    def complete(
        self, model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, *, num_samples: int, record: Path
    ) -> list[Completion]:
        """Completions of prompts, as `kto_jax.sampling.complete.complete` returns them.

        Args:
          model: whose tokenizer encodes the prompts; its parameters are not read.
          prompts: text or chat messages.
          sampling: how completions are drawn.
          num_samples: completions of each prompt.
          record: file of the answers.

        Raises:
          ConfigError: a prompt does not fit, or the server refuses a request or answers something else.
          TransientError: it cannot be reached, or fails.
        """
        encoded = tokenize.encode_prompts(model.tokenizer, list(prompts), model.workers)
        check_prompts(model.model.config, encoded, int(sampling.max_new_tokens))
        eos_ids = {*model.tokenizer.stop_ids, *model.model.config.eos_ids}
        answers = Answers(record)
        missing = [[str(i)] for i in range(len(prompts)) if str(i) not in answers.known]

        def ask(keys: Sequence[str]) -> list[Any]:
            ids = encoded[int(keys[0])]
            drawn = self._ask(ids, sampling, num_samples)
            for one in drawn:
                self._check(one, int(sampling.max_new_tokens), eos_ids, model.model.config.vocab_size)
            return [drawn]

        ask_all(answers, missing, ask, at_once=_AT_ONCE)
        return [
            Completion(
                prompts[i],
                tokenize.decode(model.tokenizer, np.asarray(drawn["ids"])),
                tuple(drawn["ids"]),
                drawn["ids"][-1] in eos_ids,
                tuple(encoded[i].tolist()),
                tuple(drawn["logps"]),
            )
            for i in range(len(prompts))
            for drawn in answers.known[str(i)]
        ]

    def _ask(self, ids: np.ndarray, sampling: Sampling, num_samples: int) -> list[dict[str, Any]]:
        """Token ids, log-probabilities and the reason for the end of each completion of a prompt."""
        body = {
            "model": self.name, "prompt": ids.tolist(), "n": num_samples, "max_tokens": int(sampling.max_new_tokens),
            "temperature": float(sampling.temperature), "top_p": 1.0, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "logprobs": 1, "return_token_ids": True,
        }  # fmt: skip
        try:
            content = post_json(
                f"{self.url}/completions", json.dumps(body).encode(), token=TOKEN, seconds=_SECONDS, wait=self.wait
            )
        except PostError as error:
            if not error.may_pass:
                raise self._refusal(str(error)) from None
            raise TransientError(
                f"--sample_from={self.url} {error}; it was asked {TRIES} times. The completions so far are kept. Run "
                "the same command again once the server is up."
            ) from None
        try:
            choices = sorted(json.loads(content)["choices"], key=lambda choice: choice["index"])
            drawn = [
                {
                    "ids": list(choice["token_ids"]),
                    "logps": list(choice["logprobs"]["token_logprobs"]),
                    "reason": choice["finish_reason"],
                }
                for choice in choices
            ]
        except (ValueError, KeyError, TypeError):
            raise self._refusal(f"answered {content[:200]!r}") from None
        if len(drawn) != num_samples:
            raise self._refusal(f"answered {len(drawn)} completions of {num_samples}")
        return drawn

    def _check(self, drawn: dict[str, Any], most: int, eos_ids: set[int], vocab_size: int) -> None:
        """Refuses a completion that cannot be trained on as it is."""
        ids, logps, reason = drawn["ids"], drawn["logps"], drawn.pop("reason")
        if not ids or len(ids) > most or len(ids) != len(logps):
            raise self._refusal(f"answered {len(ids)} tokens with {len(logps)} log-probabilities, of at most {most}")
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self._refusal(f"answered a token that is none of the model's {vocab_size}")
        if not all(type(x) in (int, float) and math.isfinite(x) and x < 1e-3 for x in logps):
            raise self._refusal("answered a value that is no log-probability")
        if (ids[-1] in eos_ids) != (reason == "stop") or any(i in eos_ids for i in ids[:-1]):
            raise self._refusal(
                f"answered a completion with finish_reason {reason!r} that ends in token {ids[-1]}, where "
                f"{sorted(eos_ids)} end completions"
            )

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"--sample_from={self.url} {what}. An answer holds token_ids, the EOS among them, and token_logprobs of "
            "each completion, as vLLM's /v1/completions gives them with return_token_ids. Correct the server or "
            "--sample_model."
        )
