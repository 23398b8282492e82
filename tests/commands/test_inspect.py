"""The command that explains the feedback of a run."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from kto_jax.inspect import bars, histogram, main
from tests import ROOT

CONFIG = f"--config={ROOT / 'configs/tiny.py'}"


def rows():
    good = [{"prompt": f"Question {i}?", "completion": f"Text {i}.", "label": i % 4 == 0} for i in range(40)]
    return [
        *good,
        {"prompt": "Question 1?", "completion": "Text 1.", "label": False},
        {"prompt": "Question 2?", "completion": "Text 2.", "label": True},
        {"prompt": "Question 3?", "completion": "", "label": True},
        {"prompt": "Long?" + " word" * 90, "completion": "Red \x1b[31m and [bold] brackets.", "label": True},
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def printed(cache):
    """What the command prints, in a process of its own, which says whether it touched a device."""
    script = (
        "import sys; from kto_jax.inspect import main; from jax._src import xla_bridge; code = main(sys.argv[1:]);"
        "print('backends', xla_bridge.backends_are_initialized(), 'code', code)"
    )
    arguments = [CONFIG, f"--config.data.train={cache / 'rows.jsonl'}", "--config.data.holdout=0.0"]
    arguments += ["--config.data.max_rejected=0.5", "--rows=43"]
    environment = {**os.environ, "KTO_JAX_CACHE": str(cache), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout


def cells(printed, first):
    """The cells of the line of a table that begins with `first`."""
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in printed.splitlines() if "│" in line]
    return next(line[1:] for line in lines if line[0] == first)


def test_no_device_is_touched(printed):
    assert printed.splitlines()[-1] == "backends False code 0"


def test_the_counts_are_those_of_the_file(printed, cache):
    assert cells(printed, str(cache / "rows.jsonl")) == ["train", "fields", "44", "43", "0", "1"]
    assert cells(printed, "train")[:3] == ["12", "31", "41"]
    assert cells(printed, "empty completion") == ["1", f"{cache / 'rows.jsonl'}:43"]
    assert [cells(printed, name)[0] for name in ("duplicates", "contradictory", "prompts_cut")] == ["1", "1", "1"]
    assert cells(printed, "total")[5] == "64"  # the longest row, cut to data.max_length


def test_it_says_which_weights_the_counts_ask_for(printed):
    assert "12 desirable and 31 undesirable rows to train on ask for λ_D = 2.583 and λ_U = 1" in printed
    assert "from 0.387 to 1." in printed


def test_a_row_is_shown_as_it_is_trained_on_and_the_mask_can_be_seen(printed, cache):
    at = printed.index(f"{cache / 'rows.jsonl'}:44 · desirable")
    shown = printed[at:].split("───")[0]
    assert "tokens of prompt (cut from" in shown and " ".join(shown.split()).count("word") < 60
    # Neither the terminal nor rich's markup obeys what somebody wrote.
    assert r"⟦Red \x1b[31m and [bold] brackets.<|im_end|>⟧" in shown.replace("</s>", "<|im_end|>")
    assert "\x1b" not in printed
    assert printed.count("⟦") == 43


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows=many"], "--rows='many' cannot be used"),
        (["--rows=-1"], "--rows=-1 cannot be used. Allowed: an integer, 0 or more"),
        (["--row=3"], "Did you mean '--rows'"),
        (["--config.data.train=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_command_that_cannot_be_used_is_refused(arguments, message, capsys, cache, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))
    assert main([CONFIG, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_scores_of_one_label_are_shown_and_no_weight_is_suggested(capsys, cache, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))
    scored = [{"prompt": f"Question {i}?", "completion": "Text.", "score": 1.5 + i} for i in range(3)]
    (cache / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    changes = [
        "data.format=scores",
        "data.score_threshold=1.0",
        "data.holdout=0.0",
        f"data.train={cache / 'scores.jsonl'}",
    ]
    assert main([CONFIG, "--rows=1", *(f"--config.{change}" for change in changes)]) == 0
    printed = capsys.readouterr().out
    assert "3 desirable and 0 undesirable rows to train on are of one label" in " ".join(printed.split())
    assert cells(printed, "rule") == ["threshold"] and cells(printed, "mean") == ["2.5"]
    assert "score " in printed.split("───")[-1] and printed.count("⟦") == 1


def test_a_row_ends_in_the_token_that_the_run_would_teach(capsys, cache, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))
    ends = {}
    for token in ("<|im_end|>", "<|im_start|>"):
        assert main([CONFIG, "--rows=5", f"--config.data.eos_token={token}"]) == 0
        ends[token] = capsys.readouterr().out.count("<|im_start|>")
    assert ends["<|im_start|>"] == ends["<|im_end|>"] + 5


def test_a_mixture_is_shown_by_source_and_weights_are_suggested_from_its_visits(capsys, cache, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "200")
    for name, label in (("good", True), ("bad", False)):
        rated = [{"prompt": f"Question {i}?", "completion": f"{name} {i}.", "label": label} for i in range(20)]
        (cache / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    (cache / "mixed.py").write_text(
        f"""import runpy
def get_config():
    config = runpy.run_path({str(ROOT / "configs/tiny.py")!r})["get_config"]()
    config.data.train = ({{"source": {str(cache / "good.jsonl")!r}, "weight": 0.5}}, {str(cache / "bad.jsonl")!r})
    config.data.holdout = 0.0
    return config
"""
    )
    assert main([f"--config={cache / 'mixed.py'}", "--rows=0"]) == 0
    printed = capsys.readouterr().out
    epoch = printed[printed.index("an epoch of") :]
    assert cells(epoch, str(cache / "good.jsonl")) == ["0.5", "20", "0", "20", "33.3%", "100.0%"]
    assert cells(epoch, str(cache / "bad.jsonl")) == ["1", "0", "20", "0", "66.7%", "0.0%"]
    assert "10 desirable and 20 undesirable rows to train on ask for λ_D = 2 and λ_U = 1" in " ".join(printed.split())


@pytest.mark.parametrize(("objective", "second", "warning"), [
    ("dpo", "Question 1?", ["0 pairs to train on, and the objective 'dpo' reads pairs."]),
    ("dpo", "Question 0?", ["1 of 3 completions to train on are in no pair; 'dpo' leaves them out."]),
    ("sft", "Question 0?", ["1 of 3 completions to train on are undesirable; 'sft' leaves them out."]),
    ("kto", "Question 0?", []),
])  # fmt: skip
def test_what_the_objective_leaves_out_is_reported(capsys, tmp_path, monkeypatch, objective, second, warning):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    rated = [("Question 0?", True), (second, False), ("Question 2?", True)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "completion": "Hm.", "label": label}) + "\n" for prompt, label in rated
        ).replace("Hm.", "Yes.", 1)
    )
    recipe = [CONFIG, f"--config.objective.name={objective}", f"--config.data.train={tmp_path / 'rows.jsonl'}"]
    recipe += ["--config.data.holdout=0.0", "--rows=0"]
    assert main(recipe) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning: ") == len(warning) and all(text in printed for text in warning)
    assert main([*recipe, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["warnings"]
    assert [text[: len(expected)] for text, expected in zip(found, warning, strict=True)] == warning


def test_help_says_what_it_does(capsys):
    assert main(["--help"]) == 0 and "--rows" in capsys.readouterr().out


def counts_of(table, capsys):
    Console(width=120).print(table)
    lines = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {name.strip(): (int(count.replace(",", "")), bar.strip()) for name, count, bar in lines}


def test_every_value_is_in_one_bar_of_a_histogram_and_the_long_tail_in_the_last(capsys):
    values = np.array([1] * 500 + list(range(1, 101)) + [5000])
    shown = counts_of(histogram("tokens", values), capsys)
    assert sum(count for count, _ in shown.values()) == 601
    assert next(iter(shown)) == "1 to 10" and shown["1 to 10"][0] == 510
    assert list(shown)[-1].endswith("or more") and shown[list(shown)[-1]][0] >= 1 and len(shown) <= 11
    assert list(counts_of(histogram("tokens", np.array([7, 7])), capsys)) == ["7 to 7"]


def test_bars_are_as_long_as_their_counts_and_whatever_is_there_can_be_seen(capsys):
    shown = counts_of(bars("labels", {"a": 10000, "b": 5000, "c": 1, "d": 0}), capsys)
    assert [bar for _, bar in shown.values()] == ["█" * 40, "█" * 20, "▏", ""]


def test_a_warning_of_the_files_or_of_their_text_is_repeated_by_every_call(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path))
    row = {"prompt": "Q?", "completion": "A.</s>", "label": True, "context": "C"}
    rows = [row, {**row, "completion": "B <|im_end|> C.", "label": False}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [CONFIG, f"--config.data.train={tmp_path / 'rows.jsonl'}", "--config.data.holdout=0.0", "--json"]
    found = []
    for _ in range(2):  # The second call reopens the index.
        assert main(arguments) == 0
        captured = capsys.readouterr()
        found.append((json.loads(captured.out)["warnings"], "look like content" in captured.err))
    assert [printed for _, printed in found] == [True, False] and found[0][0] == found[1][0]
    columns, end, text = found[0][0]
    assert "rows.jsonl: the columns 'context' look like content and are not read" in columns
    assert end.startswith("1 completions end in '</s>'") and text.startswith(
        "completions hold the text '<|im_end|>' 1 t"
    )


def test_every_warning_has_a_row_in_the_docs(tmp_path):
    """By what each says around its figures and names."""
    page = (ROOT / "docs" / "inspect.md").read_text().partition("## Warnings")[2]
    said = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    source = "".join((ROOT / "kto_jax" / name).read_text() for name in (
        *("inspect.py", "data/rows/records.py", "data/rows/tables.py", "data/rows/files.py"),
    ))  # fmt: skip
    for words in said:
        parts = [part.strip(" ;'") for piece in words.split("…") for part in re.split(r"'</s>'|, which", piece)]
        assert all(part in re.sub(r'"\s*f?"', "", source) for part in parts), words
