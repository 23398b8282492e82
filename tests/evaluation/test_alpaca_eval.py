"""AlpacaEval's files are read and written."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from kto_jax.config import ConfigError
from kto_jax.evaluation.alpaca_eval import align, read_outputs, write_annotations, write_outputs
from kto_jax.evaluation.completions import Answer
from kto_jax.evaluation.contest import hold_contest
from kto_jax.evaluation.pair_judges import ScoreJudge
from kto_jax.rollouts.prompts import PromptRow

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ONE_TURN = [{"role": "user", "content": "Name a film."}]


def made(prompt, text):
    return Answer(prompt, text, PromptRow(prompt, {}, "").key)


def test_outputs_are_read_as_they_were_written(tmp_path):
    answers = [made("Name a film.", "Jaws."), made(CHAT, "Hello."), made(ONE_TURN, "Heat.")]
    write_outputs(tmp_path / "outputs.json", answers, "mine", "films")
    rows = json.loads((tmp_path / "outputs.json").read_text())
    assert [row["instruction"] for row in rows] == ["Name a film.", "system: Be brief.\n\nuser: Hi", "Name a film."]
    assert {(row["generator"], row["dataset"]) for row in rows} == {("mine", "films")}
    read, name = read_outputs(str(tmp_path / "outputs.json"))
    assert name == "mine"
    assert [(one.prompt, one.text, one.key) for one in read] == [(one.prompt, one.text, one.key) for one in answers]


def test_annotations_give_the_win_rate_that_alpaca_eval_computes(tmp_path):
    rng = np.random.default_rng(0)
    ours = [made(f"p{i}", "x" * int(rng.integers(1, 9))) for i in range(40)]
    theirs = [made(f"p{i}", "x" * int(rng.integers(1, 9))) for i in range(40)]
    judge = ScoreJudge("length", lambda answers: [len(one.text) for one in answers])
    contest = hold_contest(("a", "b"), None, ours, theirs, [judge])
    write_annotations(tmp_path / "annotations.json", [contest.judged[0].judgement], ours, theirs, ("a", "b"))
    rows = json.loads((tmp_path / "annotations.json").read_text())
    preferences = [row["preference"] for row in rows]
    assert np.mean(preferences) - 1 == pytest.approx(contest.judged[0].win.rate.value)
    assert stats.sem(preferences) == pytest.approx(contest.judged[0].win.standard_error)
    assert set(preferences) == {1.0, 1.5, 2.0}
    won = next(row for row in rows if row["preference"] == 2)
    assert won["generator_2"] == "a" and len(won["output_2"]) > len(won["output_1"])


def test_a_verdict_that_could_not_be_read_is_null(tmp_path):
    ours, theirs = [made("p", "x")], [made("p", "y")]
    judge = ScoreJudge("none", lambda answers: [None for _ in answers])
    contest = hold_contest(("a", "b"), None, ours, theirs, [judge])
    write_annotations(tmp_path / "annotations.json", [contest.judged[0].judgement], ours, theirs, ("a", "b"))
    assert json.loads((tmp_path / "annotations.json").read_text())[0]["preference"] is None
    assert math.isnan(contest.judged[0].win.rate.value)


def test_outputs_are_aligned_by_prompt_and_by_turn():
    theirs = [made("q", "1"), made("p", "2"), made("p", "3")]
    assert [one.text for one in align([made("p", ""), made("q", ""), made("p", "")], theirs)] == ["2", "1", "3"]


@pytest.mark.parametrize(
    ("ours", "theirs", "who"),
    [("pq", "p", "the baseline"), ("p", "pp", "the evaluated model"), ("p", "q", "the baseline")],
)
def test_outputs_of_other_prompts_are_refused(ours, theirs, who):
    with pytest.raises(ConfigError, match=f"{who} has no completion beside"):
        align([made(p, "x") for p in ours], [made(p, "y") for p in theirs])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "holds no outputs"), ('{"a": 1}', "holds dict"),
     ('[{"instruction": "p", "output": "x"}, {"instruction": ""}]', "entry 2 has no instruction or no output"),
     ('[{"instruction": "p", "output": null}]', "entry 1 has no instruction"),
     ('[{"instruction": "", "output": "x"}]', "entry 1 has no instruction"),
     ('[{"instruction": "p", "output": "x", "generator": "a"}, {"instruction": "p", "output": "x"}]', "2 generators")],
)  # fmt: skip
def test_a_bad_file_of_outputs_is_named(tmp_path, text, message):
    path = tmp_path / "outputs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_outputs(str(path))
