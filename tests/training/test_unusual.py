"""Steps with an unusual loss are reported with the ids and places of their rows."""

import dataclasses
import math
import types

import numpy as np
import pytest

from kto_jax.config import Config, WatchConfig
from kto_jax.training import unusual
from kto_jax.training.unusual import UnusualSteps


@pytest.fixture
def messages(monkeypatch):
    printed = []
    monkeypatch.setattr(unusual.console, "print", lambda text, **_: printed.append(text))
    return printed


def make(batch_size=2, **watch):
    steps = types.SimpleNamespace(step=lambda step: types.SimpleNamespace(ids=step * 100 + np.arange(batch_size)))
    index = types.SimpleNamespace(place=lambda row: f"a.jsonl:{row + 1}")
    config = dataclasses.replace(Config(), watch=WatchConfig(**watch))
    return UnusualSteps(config, types.SimpleNamespace(schedule=steps, index=index))


def feed(steps, losses):
    for step, loss in enumerate(losses, start=1):
        steps.report(step, {"loss": loss, "num_bad_steps": 0.0 if math.isfinite(loss) else 1.0})


QUIET = [0.5 + 0.01 * (-1) ** step for step in range(30)]


def test_a_spike_is_reported_with_its_rows(messages):
    feed(make(), [*QUIET, 0.9, *QUIET])
    (message,) = messages
    assert "the loss of step 31 is 0.9; the median of the 30 before is 0.5 " in message
    assert message.endswith("Its rows: 3000 (a.jsonl:3001), 3001 (a.jsonl:3002)")


@pytest.mark.parametrize("losses, watch", [
    ([*QUIET, 0.6], {}),  # within ten deviations of 0.0148
    ([*QUIET[:15], 0.9], {}),  # too few to compare with
    ([*QUIET, 0.1], {}),  # lower is no spike
    ([*QUIET, 0.9], {"spike_deviations": 0.0}),
])  # fmt: skip
def test_other_losses_are_not_reported(messages, losses, watch):
    feed(make(**watch), losses)
    assert messages == []


def test_a_lasting_rise_is_reported_until_it_is_usual(messages):
    feed(make(), [*QUIET, *(0.9 + 0.01 * (-1) ** step for step in range(100))])
    assert 0 < len(messages) <= 30


def test_a_bad_step_is_reported_and_is_no_part_of_the_median(messages):
    feed(make(), [*QUIET, math.nan, math.inf, 0.9])
    assert ["non-finite" in message for message in messages] == [True, True, False]
    assert "the median of the 30 before" in messages[-1]


def test_of_a_large_batch_64_rows_are_shown(messages):
    feed(make(batch_size=100), [math.nan])
    assert messages[0].count("a.jsonl:") == 64 and messages[0].endswith(" and 36 more")
