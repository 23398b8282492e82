"""The page that compares runs, from what they left in their folders."""

import json

import pytest

from kto_jax import compare
from tests.reports.test_page import EVIL, Tags, metrics


def write_run(folder, *, after=0.8, low=0.4, high=0.7, name="kto", judged=True, **config):
    folder.mkdir(parents=True)
    settings = {"objective": {"name": name, "beta": 0.1}, "data": {"train": "feedback.jsonl"}, "seed": 0} | config
    (folder / "config.json").write_text(json.dumps(settings))
    rows = [*metrics(20), {"step": 19, "eval_loss": 0.4, "eval_auc": 0.7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = {"judge": "feedback", "figure": "judged desirable (share)", "before": 0.2, "after": after, "low": low,
               "high": high, "prompts": 40}  # fmt: skip
    if judged:
        (folder / "verdicts.json").write_text(json.dumps([verdict]))
        prompts = [[{"role": "user", "content": "Name a film."}], EVIL]
        samples = {"prompts": prompts, "completions": [f"by {folder.name}", EVIL], "perplexity": None}
        (folder / "samples_after.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    def run(*runs, out="page.html"):
        code = compare.main([*map(str, runs), f"--out={tmp_path / out}"])
        page = tmp_path / out
        return code, *capsys.readouterr(), page.read_text() if page.exists() else ""

    return run


def test_two_runs_are_compared_by_judge_settings_and_curves(tmp_path, command):
    runs = write_run(tmp_path / "a", after=0.5, low=0.1, high=0.35), write_run(tmp_path / "b", seed=EVIL)
    code, said, _, page = command(*runs)
    assert code == 0
    assert (
        "By the judge feedback, judged desirable after training: b 80 %, a 50 %. The intervals of the changes do not"
        in said
    )
    assert "20 % → 80 % (+40 to +70)" in page
    assert ">seed<" in page and ">objective.beta<" not in page
    assert page.count("<svg ") == 9 and "by a" in page and "by b" in page
    tags = Tags(page)
    assert tags.open == [] and tags.names.count("script") == 1 and "&lt;script&gt;" in page
    assert len(tags.identifiers) == len(set(tags.identifiers))


def test_runs_that_cannot_be_told_apart_are_called_so(tmp_path, command):
    runs = [write_run(tmp_path / name, after=after) for name, after in (("a", 0.8), ("b", 0.7), ("c", 0.6))]
    assert "the first two cannot be told apart" in command(*runs)[1]


def test_what_cannot_be_compared_is_said(tmp_path, command):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", name="dpo", data={"train": "other"}, judged=False)]
    code, said, _, page = command(*runs)
    assert code == 0 and "No judge read all of them. Held-out loss: a 0.4, b 0.4" in said
    assert "different objectives" in page and "different data" in page and "verdicts are in b" in page


def test_win_rates_of_an_evaluation_are_shown(tmp_path, command):
    runs = [write_run(tmp_path / name) for name in "ab"]
    judge = {"judge": "vader", "rate": {"value": 0.6, "low": 0.5, "high": 0.7}, "prompts": 30}
    (runs[1] / "evaluation").mkdir()
    record = {"contests": [{"baseline": "the reference", "judges": [judge]}]}
    (runs[1] / "evaluation" / "evaluation.json").write_text(json.dumps(record))
    page = command(*runs)[3]
    assert "vader, against the reference" in page and "60 % (50 to 70; 30 prompts)" in page


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, command):
    runs = [write_run(tmp_path / name / "run") for name in "ab"]
    page = command(*runs)[3]
    assert "a/run" in page and "b/run" in page


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["a"], "1 runs were given"), (["a", "none"], "none is not the folder of a run"), (["a", "a"], "a run twice"),
     (["a", "torn"], "verdicts.json cannot be read")],
)  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, command, runs, message):
    write_run(tmp_path / "a")
    (write_run(tmp_path / "torn") / "verdicts.json").write_text("{")
    code, _, errors, page = command(*(tmp_path / name for name in runs))
    assert code == 2 and message in errors and not page
