"""Prompts of online training."""

import json

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.rollouts.prompts import prompts_of_round, read_prompts


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_come_from_a_field_or_a_template_with_their_columns(tmp_path):
    file = write(
        tmp_path / "p.jsonl", {"topic": "rain", "answer": 1}, {"topic": "snow"}, {"topic": "rain", "answer": 2}
    )
    train, held_out = read_prompts(DataConfig(train=file, prompt_template="What is {topic}?", holdout=0.0))
    assert [row.prompt for row in train] == ["What is rain?", "What is snow?"] and held_out == []
    assert train[0].columns == {"topic": "rain", "answer": 1} and train[0].place == f"{file}:1"
    train, _ = read_prompts(DataConfig(train=file, prompt_field="topic", system_field="topic", holdout=0.0))
    assert train[1].prompt == [{"role": "system", "content": "snow"}, {"role": "user", "content": "snow"}]


def test_a_prompt_is_held_out_by_its_text_whatever_the_others_are(tmp_path):
    rows = [{"prompt": f"Q{i}?"} for i in range(200)]
    data = DataConfig(train=write(tmp_path / "p.jsonl", *rows), holdout=0.25)
    train, held_out = read_prompts(data)
    assert len(train) + len(held_out) == 200 and 30 < len(held_out) < 70
    fewer = DataConfig(train=write(tmp_path / "q.jsonl", *rows[100:]), holdout=0.25)
    assert {row.prompt for row in read_prompts(fewer)[1]} == {row.prompt for row in held_out} & {
        row["prompt"] for row in rows[100:]
    }


def test_every_pass_has_each_prompt_once_in_an_order_of_its_own(tmp_path):
    file = write(tmp_path / "p.jsonl", *({"prompt": f"{i}"} for i in range(10)))
    train, _ = read_prompts(DataConfig(train=file, holdout=0.0))
    rounds = [[row.prompt for row in prompts_of_round(train, number, 4, seed=1)] for number in range(5)]
    seen = [prompt for one in rounds for prompt in one]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [str(i) for i in range(10)] and seen[:10] != seen[10:]
    assert rounds[0] != [row.prompt for row in prompts_of_round(train, 0, 4, seed=2)]
    assert len(prompts_of_round(train, 0, 99, seed=1)) == 10


@pytest.mark.parametrize("row, what", [
    ({"question": "Q?"}, r"p.jsonl:1 has no 'prompt'; its columns are 'question'"),
    ({"prompt": "  "}, r"p.jsonl:1: the prompt is '  '. Allowed: some text, or messages"),
    ([1], r"p.jsonl:1 has no 'prompt'; its columns are none"),
])  # fmt: skip
def test_a_row_without_a_prompt_is_refused(tmp_path, row, what):
    with pytest.raises(ConfigError, match=what):
        read_prompts(DataConfig(train=write(tmp_path / "p.jsonl", row)))


def test_a_hold_out_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds 1 prompts, and config.data.holdout=0.99\d* leaves none"):
        read_prompts(DataConfig(train=write(tmp_path / "p.jsonl", {"prompt": "Q"}), holdout=0.99999))
