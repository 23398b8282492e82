"""Reward functions: what `kto_jax.online` scores completions with.

A function is called as TRL calls it, with everything by name:

    def reward(prompts, completions, completion_ids, ended, num_tokens, **columns) -> list[float | None]

`columns` are the columns of the prompts' file. A function that takes fewer names gets only those. It may be async.
`None` says that the reward does not apply to that completion.

    lowercase, max_words(12)             a checker of `kto_jax.rewards.checkers`
    rewards.py:brevity, package.module:brevity      a function of yours
    runs/reward                          a reward model: a run of the reward objective, or a Hugging Face directory
    https://host/score                   a server: `kto_jax.rewards.endpoint` says what it is asked

`* 0.5` behind it is its weight in the sum.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError, nearest
from kto_jax.rewards.checkers import CHECKERS
from kto_jax.rewards.endpoint import Endpoint, Row
from kto_jax.rewards.messages import text_of
from kto_jax.rewards.reward_model import open_reward_model, reward

_WEIGHT = re.compile(r"^(?P<name>.*?)\s*\*\s*(?P<weight>-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*$", re.IGNORECASE)
_CALL = re.compile(r"^(?P<name>[a-z_]+)(?P<arguments>\(.*\))?$", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Completions to be scored; all sequences are as long.

    Attributes:
      prompts: text or chat messages.
      completions: text, or a list of one message if the prompt is chat messages.
      completion_ids: token ids, including the EOS if it ended in one.
      ended: whether it ended in an EOS; otherwise it was cut.
      columns: the other columns of the prompts' file, each a value for every completion.
      places: `file:line` of each prompt.
      record: file that keeps the answers of servers; None keeps none.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    ended: Sequence[bool]
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str]
    record: Path | None = None

    def rows(self) -> list[Row]:
        """Each completion as a server is asked about it."""
        return [
            {
                "prompt": self.prompts[row],
                "completion": self.completions[row],
                "ended": self.ended[row],
                "num_tokens": len(self.completion_ids[row]),
                "columns": {name: values[row] for name, values in self.columns.items()},
            }
            for row in range(len(self.prompts))
        ]

    def arguments(self, rows: slice) -> dict[str, Any]:
        """What a function is called with, for some of the completions."""
        own = {
            "prompts": list(self.prompts[rows]),
            "completions": list(self.completions[rows]),
            "completion_ids": [list(ids) for ids in self.completion_ids[rows]],
            "ended": list(self.ended[rows]),
            "num_tokens": [len(ids) for ids in self.completion_ids[rows]],
        }
        return {name: list(values[rows]) for name, values in self.columns.items()} | own


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A reward with its weight in the sum."""

    name: str
    weight: float
    function: Callable[..., Any] | Endpoint

    def __call__(self, scored: Scored, timeout: float) -> list[float | None]:
        """One reward for each completion.

        Args:
          scored: the completions.
          timeout: seconds after which the function counts as hung.

        Raises:
          ConfigError: the function raised, or returned anything but one finite number or None for each completion.
          TransientError: it did not return in time.
        """
        if isinstance(self.function, Endpoint):
            ask = self.function.rewards
            return _within(lambda: ask(scored.rows(), scored.record), timeout, self.name)
        everything = slice(None)
        try:
            found = self._call(scored, everything, timeout)
        except (ConfigError, TransientError):
            raise
        except Exception as error:
            raise self._refusal(
                f"raised {type(error).__name__}: {error}", scored, self._culprit(scored, timeout)
            ) from (error)
        count = len(scored.prompts)
        if not isinstance(found, Sequence | Mapping) and hasattr(found, "tolist"):
            found = found.tolist()  # NumPy, JAX and torch.
        if isinstance(found, str | Mapping) or not isinstance(found, Sequence):
            raise self._refusal(f"returned {type(found).__name__}, not a list", scored, 0)
        if len(found) != count:
            raise self._refusal(f"returned {len(found)} values for {count} completions", scored, 0)
        for row, value in enumerate(found):
            if value is not None and not _is_finite(value):
                raise self._refusal(f"returned {value!r}", scored, row)
        return [None if value is None else float(value) for value in found]

    def _call(self, scored: Scored, rows: slice, timeout: float) -> Any:
        function, arguments = self.function, scored.arguments(rows)
        assert not isinstance(function, Endpoint)
        taken = inspect.signature(function).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            arguments = {name: value for name, value in arguments.items() if name in taken}
        return _within(lambda: _finished(function(**arguments)), timeout, self.name)

    def _culprit(self, scored: Scored, timeout: float) -> int:
        """The first completion on which the function raises if it is called with that one alone; else the first."""
        for row in range(len(scored.prompts)):
            try:
                self._call(scored, slice(row, row + 1), timeout)
            except Exception:
                return row
        return 0

    def _refusal(self, what: str, scored: Scored, row: int) -> ConfigError:
        said = text_of(scored.completions[row])[:80]
        return ConfigError(
            f"the reward {self.name} {what}; prompt {scored.places[row]}, completion {said!r}. A reward returns one "
            "finite number, or None, for each completion. Correct the function, or take it out of --reward. "
            "Completions that were sampled are kept."
        )


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _finished(found: Any) -> Any:
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found


def _within(call: Callable[[], Any], timeout: float, name: str) -> Any:
    """The result of a call, which runs in a thread.

    Raises:
      TransientError: it takes longer than `timeout` seconds. The thread is left behind.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TransientError(
            f"the reward {name} has not returned for {timeout:g} s, which --reward_timeout allows. The completions "
            "that were sampled are kept. Run the same command again, or raise --reward_timeout."
        )
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def total_rewards(
    functions: Sequence[RewardFunction], scored: Scored, timeout: float
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """The weighted sum of the rewards of each completion, and every reward alone.

    Args:
      functions: the rewards.
      scored: the completions.
      timeout: seconds that each function may take.

    Returns:
      The sums, None where no reward applies; and name -> one value for each completion.

    Raises:
      ConfigError: a function cannot be used.
      TransientError: a function does not return.
    """
    alone = {function.name: function(scored, timeout) for function in functions}
    sums: list[float | None] = []
    for row in range(len(scored.prompts)):
        own = [(f.weight, alone[f.name][row]) for f in functions]
        applying = [weight * value for weight, value in own if value is not None]
        sums.append(sum(applying) if applying else None)
    return sums, alone


@contextlib.contextmanager
def open_rewards(names: Sequence[str], *, dtype: str = "float32") -> Iterator[list[RewardFunction]]:
    """Opens rewards by the names that the top of this file lists.

    Args:
      names: at least one; none twice.
      dtype: what reward models compute in.

    Yields:
      The rewards, in order.

    Raises:
      ConfigError: a name is unknown, its arguments are wrong, or what it names cannot be used.
    """
    with contextlib.ExitStack() as stack:
        found: list[RewardFunction] = []
        for text in names:
            match = _WEIGHT.match(text)
            name, weight = (match["name"], float(match["weight"])) if match else (text.strip(), 1.0)
            if any(name == other.name for other in found):
                raise ConfigError(f"--reward names {name!r} twice. Allowed: each reward once. Take one out.")
            found.append(RewardFunction(name, weight, _open(name, stack, dtype)))
        yield found


def _open(name: str, stack: contextlib.ExitStack, dtype: str) -> Callable[..., Any] | Endpoint:
    if name.startswith(("http://", "https://")):
        return Endpoint(name)
    call = _CALL.match(name)
    if call and call["name"] in CHECKERS:
        return _checker(name, call["name"], call["arguments"] or "()")
    _, colon, attribute = name.rpartition(":")
    if colon and attribute.isidentifier():
        return _imported(name)
    if Path(name).exists():
        model = stack.enter_context(open_reward_model(name, dtype=dtype))
        return lambda prompts, completions: list(reward(model, prompts, [text_of(said) for said in completions]))
    raise ConfigError(
        f"--reward={name!r} is no reward. {nearest(call['name'] if call else name, CHECKERS)} Allowed: these checkers, "
        "FILE.py:FUNCTION, MODULE:FUNCTION, the folder of a reward model or the URL of a server. Correct --reward."
    )


def _checker(text: str, name: str, arguments: str) -> Callable[..., Any]:
    make = CHECKERS[name]
    try:
        parsed = ast.parse(f"f{arguments}", mode="eval").body
        assert isinstance(parsed, ast.Call) and not parsed.keywords
        return make(*(ast.literal_eval(argument) for argument in parsed.args))
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"--reward={text!r} cannot be read: {error or type(error).__name__}. Allowed: {name}"
            f"{inspect.signature(make, eval_str=False)} with numbers or quoted text. Correct --reward."
        ) from None


def _imported(name: str) -> Callable[..., Any]:
    found = import_object(name, "--reward")
    if not callable(found):
        raise ConfigError(
            f"--reward={name!r} is {type(found).__name__}. Allowed: a function. Correct --reward or the file."
        )
    return found


def import_object(name: str, flag: str) -> Any:
    """What FILE.py:NAME or MODULE:NAME names.

    Args:
      name: where it is.
      flag: what named it, for errors.

    Raises:
      ConfigError: it cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"kto_jax_reward_{Path(place).stem}", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except Exception as error:
        raise ConfigError(
            f"{flag}={name!r} cannot be imported: {type(error).__name__}: {error}. Allowed: FILE.py:FUNCTION or "
            f"MODULE:FUNCTION. Correct {flag} or the file."
        ) from error
