"""Control texts at the end of prompts, which CSFT chooses by label."""

import numpy as np
import pytest

from kto_jax.config import ConfigError
from tests.data.batches.indices import BOS, fake_index, make_schedule, random_index, unpack

CONTROLS = (np.array([501, 502, 503]), np.array([504]))


def test_a_control_ends_the_prompt_by_the_label_of_its_completion():
    index = random_index(33)
    schedule = make_schedule(index, batch_size=33, unmatched=False, controls=CONTROLS)
    expected = sorted(
        (index.prompt(i).tolist() + CONTROLS[int(index.desirable[i])].tolist(), index.completion(i).tolist(), None)
        for i in range(33)
    )
    batch = schedule.batch(0)
    assert unpack(batch.matched) == expected and batch.matched.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("lengths", "max_length", "max_prompt_length", "kept"),
    [
        ((10, 4), 12, 11, 5),  # 12 - 4 - 3 of the control
        ((10, 4), 12, 6, 3),  # 6 - 3 of the control
        ((10, 4), 12, 2, 1),  # the control is longer than max_prompt_length, and stays
        ((10, 8), 12, 6, 1),
        ((5, 4), 12, 2, 5),  # all fits together
    ],
)
def test_a_control_is_never_cut_but_the_prompt_before_it_is_from_the_left(lengths, max_length, max_prompt_length, kept):
    index = fake_index([lengths], max_prompt_length=max_prompt_length)
    index.desirable[0] = False
    limits = {"row_length": 16, "completion_length": 16, "max_length": max_length}
    schedule = make_schedule(index, batch_size=2, unmatched=False, controls=CONTROLS, **limits)
    ((prompt, completion, _),) = unpack(schedule.batch(0).matched)
    original = index.prompt(0).tolist()
    expected = [BOS, *original[len(original) - kept + 1 :]] if kept > 1 else original[-1:]
    assert prompt == [*expected, 501, 502, 503] and completion == index.completion(0).tolist()


def test_a_control_that_leaves_no_token_of_the_prompt_is_refused():
    index = fake_index([(10, 8)])
    limits = {"row_length": 16, "completion_length": 16, "unmatched": False, "controls": CONTROLS}
    index.desirable[0] = False
    make_schedule(index, max_length=12, **limits)
    with pytest.raises(
        ConfigError, match=r"have 11 tokens, which leaves no prompt within data.max_length=11\. .*Raise"
    ):
        make_schedule(index, max_length=11, **limits)
    index.desirable[0] = True
    make_schedule(index, max_length=11, **limits)
