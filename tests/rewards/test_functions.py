"""Reward functions: how they are named and called, and what is refused."""

import asyncio
import dataclasses

import numpy as np
import pytest

from kto_jax.config import ConfigError, TransientError
from kto_jax.rewards.functions import RewardFunction, Scored, open_rewards, total_rewards

SCORED = Scored(
    prompts=["a?", "b?", "c?"],
    completions=["x", "yy", "zzz"],
    completion_ids=[(5, 2), (6, 7), (8, 2)],
    ended=[True, False, True],
    columns={"answer": [1, 2, None]},
    places=["p:1", "p:2", "p:3"],
)


def call(function, scored=SCORED, timeout=60):
    return RewardFunction("mine", 1.0, function)(scored, timeout)


def test_a_function_of_trl_is_called_with_everything_by_name():
    seen = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.5] * len(prompts)

    assert call(reward) == [0.5] * 3
    assert seen == {
        "prompts": ["a?", "b?", "c?"], "completions": ["x", "yy", "zzz"], "completion_ids": [[5, 2], [6, 7], [8, 2]],
        "ended": [True, False, True], "num_tokens": [2, 2, 2], "answer": [1, 2, None],
    }  # fmt: skip


def test_a_function_may_take_fewer_names_be_async_and_return_arrays_or_none():
    async def later(completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    assert call(later) == [1.0, 2.0, 3.0]
    assert call(lambda ended: np.asarray(ended, np.float32)) == [1.0, 0.0, 1.0]
    assert call(lambda answer: [None if value is None else value for value in answer]) == [1.0, 2.0, None]


def breaks_on_zzz(completions):
    if "zzz" in completions:
        raise KeyError("zzz")
    return [0.0] * len(completions)


@pytest.mark.parametrize("function, what", [
    (breaks_on_zzz, r"mine raised KeyError: 'zzz'; prompt p:3, completion 'zzz'"),
    (lambda completions: [1.0], r"returned 1 values for 3 completions"),
    (lambda completions: 1.0, r"returned float, not a list"),
    (lambda completions: "abc", r"returned str, not a list"),
    (lambda completions: [0.0, float("nan"), 1.0], r"returned nan; prompt p:2, completion 'yy'"),
    (lambda completions: [0.0, 1.0, "good"], r"returned 'good'; prompt p:3"),
])  # fmt: skip
def test_what_is_no_reward_is_refused_with_the_function_the_prompt_and_the_completion(function, what):
    with pytest.raises(ConfigError, match=what + r".*Correct the function"):
        call(function)


def test_a_function_that_hangs_is_left_behind():
    import threading

    with pytest.raises(TransientError, match=r"mine has not returned for 0.05 s"):
        call(lambda completions: threading.Event().wait(), timeout=0.05)


def test_rewards_are_summed_by_weight_where_they_apply(tmp_path):
    (tmp_path / "own.py").write_text("def numbers(answer):\n    return answer\n")
    with open_rewards(["max_words(1) * 0.5", f"{tmp_path}/own.py:numbers*-2"]) as rewards:
        sums, alone = total_rewards(rewards, SCORED, 60)
        assert sums == [0.5 - 2, 0.5 - 4, 0.5]
        assert alone == {"max_words(1)": [1.0] * 3, f"{tmp_path}/own.py:numbers": [1.0, 2.0, None]}
        none = dataclasses.replace(SCORED, columns={"answer": [None] * 3})
        assert total_rewards(rewards[1:], none, 60)[0] == [None] * 3


@pytest.mark.parametrize("names, what", [
    (["lowercase", "lowercase * 2"], "names 'lowercase' twice"),
    (["lowercas"], "is no reward. Did you mean 'lowercase'"),
    (["max_words"], r"cannot be read: .*missing.*Allowed: max_words\(count"),
    (["max_words(many)"], "cannot be read"),
    (["max_words(__import__('os'))"], "cannot be read"),
    (["json:absent"], "cannot be imported: AttributeError"),
    (["nowhere.py:reward"], "cannot be imported: FileNotFoundError"),
    (["json:__name__"], "is str. Allowed: a function"),
])  # fmt: skip
def test_what_names_no_reward_is_refused(names, what):
    with pytest.raises(ConfigError, match=what), open_rewards(names):
        pass
