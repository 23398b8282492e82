"""The command that scores completions, on a tiny random reward model."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from kto_jax import score
from kto_jax.config import DataConfig
from kto_jax.data.rows import records
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.rewards import reward_model
from tests import COMPILER_FLAGS, ROOT
from tests.rewards.tiny import CHAT, ROWS, export, naive, write

ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILER_FLAGS}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run"))


@pytest.fixture
def command(capsys):
    """Runs the command in this process; gives its exit code and what it says."""

    def run(*arguments):
        code = score.main(arguments)
        return code, capsys.readouterr().err

    return run


def test_every_row_keeps_its_fields_and_gains_the_score_of_its_own_sequence(exported, tmp_path):
    run, model, params, tokenizer = exported
    data, out = write(tmp_path / "data.jsonl", ROWS), tmp_path / "scored.jsonl"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kto_jax.score", f"--model={run}", f"--data={data}", f"--out={out}"],
        cwd=ROOT, env=os.environ | ONE_DEVICE, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "3 rows scored, 0 rejected" in found.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "score"} for row in rows] == ROWS
    encoder = tokenize.make_encoder(tokenizer)
    for row, text in zip(rows, ("Jaws.", "Fine, and you? " * 12, ROWS[2]["completion"]), strict=True):
        prompt, completion = encoder.encode_row(row["prompt"], text)
        assert completion[-1] == tokenizer.eos_id
        np.testing.assert_allclose(row["score"], naive(model, params, np.concatenate([prompt, completion])), rtol=1e-4)
    assert len({round(row["score"], 3) for row in rows}) == 3
    # What was written is what training reads as ratings.
    read = list(records.read_records(str(out), DataConfig(format="scores", weight_field="none")))
    assert [record.score for record in read] == [row["score"] for row in rows]


def test_rows_that_cannot_be_scored_are_left_out_and_reported_with_their_place(
    exported, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(reward_model, "_BATCHES_READ_AHEAD", 1)  # Several chunks.
    rows = [
        "{", ROWS[0], {"prompt": "x", "completion": ""}, "[1]", {"prompt": "x"}, ROWS[2],
        {"prompt": "x", "completion": "far too long " * 60},
    ]  # fmt: skip
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "scored.jsonl"
    code, said = command(
        f"--model={exported[0]}", f"--data={data}", f"--out={out}", "--batch_size=2", "--max_length=90",
        "--max_prompt_length=40", "--score_field=rating",
    )  # fmt: skip
    assert code == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"] for row in kept] == [ROWS[0]["completion"], ROWS[2]["completion"]]
    assert all(isinstance(row["rating"], float) for row in kept)
    lines = [line for line in said.splitlines() if not line.startswith("uses 1 of ")]
    assert len(lines) == 6
    for line, (number, reason) in zip(
        lines, [(1, "invalid JSON"), (3, "empty completion"), (4, "not an object"), (5, "missing field 'completion'"),
                (7, "completion longer than data.max_length")], strict=False,
    ):  # fmt: skip
        assert line.startswith(f"{data}:{number}: ") and reason in line
    assert lines[-1] == "2 rows scored, 5 rejected"


def test_a_file_of_which_nothing_can_be_scored_is_exit_code_1_and_leaves_what_was_there(exported, tmp_path, command):
    data = write(tmp_path / "data.jsonl", ["{", {"prompt": "x", "completion": ""}])
    out = write(tmp_path / "scored.jsonl", ["earlier"])
    code, said = command(f"--model={exported[0] / 'policy'}", f"--data={data}", f"--out={out}")
    assert code == 1 and "0 rows scored, 2 rejected" in said
    assert out.read_text() == "earlier\n"
    assert {file.name for file in tmp_path.iterdir()} == {"data.jsonl", "scored.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "--data, --out not given"),
        (["--model=m", "--data={data}", "--out={data}"], "is --data or a directory"),
        (["--model=m", "--data={data}", "--out={directory}"], "is --data or a directory"),
        (["--model={model}", "--data={data}", "--out={directory}/none/x.jsonl"], "none/x.jsonl cannot be written"),
        (["--model={model}", "--data={data}", "--out={directory}/x", "--max_length=4000"], "context of 2048 tokens"),
        (["--model={model}", "--batch_size=0"], "batch_size"),
        (["data.jsonl"], "is not a flag"),
        (["--model=m", "--data={data}", "--out=x", "--config=configs/tiny.py"], "--data and --config are given"),
        (["--model=m", "--config=configs/tiny.py"], "--out not given"),
        (["--model=m", "--config=configs/tiny.py", "--config.data.trian=x", "--out=x"], "Did you mean 'train'"),
    ],
)
def test_an_unusable_command_is_refused_in_one_line_with_exit_code_2(exported, tmp_path, command, arguments, message):
    data = write(tmp_path / "data.jsonl", ROWS)
    values = {"model": exported[0], "data": data, "directory": tmp_path}
    code, said = command(*(argument.format(**values) for argument in arguments))
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and message in said
    assert len(data.read_text().splitlines()) == len(ROWS)


def test_everything_that_training_reads_is_scored_one_row_per_completion(exported, tmp_path, command):
    run, model, params, tokenizer = exported
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    pairs = [
        {"chosen": "\n\nHuman: Q?\n\nAssistant: Jaws.", "rejected": "\n\nHuman: Q?\n\nAssistant: Heat."},
        {"chosen": "no transcript", "rejected": "neither"},
    ]
    log = {"messages": [*CHAT, {"role": "assistant", "content": "Fine.", "feedback": "up"}], "weight": 2.0}
    skipped = {"messages": [*CHAT, {"role": "assistant", "content": "Well.", "feedback": "unsure"}]}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    (tmp_path / "config.py").write_text(f"""
from kto_jax.config import default_config
def get_config():
    config = default_config()
    config.model.path = "any"
    config.data.train = (
        {{"source": {str(write(tmp_path / "pairs.jsonl", pairs))!r}, "format": "pairs", "layout": "hh"}},
        {{"source": {str(write(tmp_path / "log.jsonl", [log, skipped]))!r}, "layout": "messages",
         "label_map": {{"up": True, "unsure": None}}}},
        {{"source": {str(write(tmp_path / "shown.jsonl", [ROWS[0] | {"weight": None, "tools": []}]))!r},
         "format": "demonstrations"}},
    )
    return config
""")
    out = tmp_path / "scored.jsonl"
    code, said = command(f"--model={run}", f"--config={tmp_path / 'config.py'}", f"--out={out}")
    assert code == 0 and "4 rows scored, 1 rejected" in said and f"{tmp_path / 'pairs.jsonl'}:2: no prompt" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    question = [{"role": "user", "content": "Q?"}]
    assert [{name: row[name] for name in row if name != "score"} for row in rows] == [
        {"prompt": question, "completion": "Jaws.", "label": True},
        {"prompt": question, "completion": "Heat.", "label": False},
        {"prompt": CHAT, "completion": "Fine.", "weight": 2.0, "label": True},
        {"prompt": "Name a film.", "completion": "Jaws."},
    ]
    encoder = tokenize.make_encoder(tokenizer)
    for row in rows:
        ids = np.concatenate(encoder.encode_row(row["prompt"], row["completion"]))
        np.testing.assert_allclose(row["score"], naive(model, params, ids), rtol=1e-4)
    # What is written of a completion reads back as the same.
    data = DataConfig()
    row = {"prompt": CHAT, "completion": [calls], "label": False, "tools": tools}
    (record,) = records.records_of(iter([("x:1", row)]), data)
    written = json.loads(json.dumps(records.row_of(record, data)))
    assert list(records.records_of(iter([("x:1", written)]), data)) == [record] and written["tools"] == tools
    scored = DataConfig(format="scores")
    (record,) = records.records_of(iter([("x:1", {"prompt": "Q", "completion": "A", "score": 2})]), scored)
    assert records.row_of(record, scored) == {"prompt": "Q", "completion": "A", "score": 2.0}


@pytest.mark.nightly
def test_ctrl_c_ends_with_one_line_and_exit_code_130_and_leaves_no_file(exported, tmp_path):
    data = tmp_path / "data.jsonl"
    os.mkfifo(data)
    process = subprocess.Popen(
        [sys.executable, "-m", "kto_jax.score", f"--model={exported[0]}", f"--data={data}", "--batch_size=1",
         f"--out={tmp_path / 'scored.jsonl'}"],
        cwd=ROOT, env=os.environ | ONE_DEVICE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        # Opened for both, so that a command that ends before it reads fails the test instead of stopping it.
        with os.fdopen(os.open(data, os.O_RDWR), "w") as feedback:
            feedback.write("{\n" + (json.dumps(ROWS[0]) + "\n") * reward_model._BATCHES_READ_AHEAD)
            feedback.flush()
            # The first rows are scored, by a worker process too, and the command waits for more.
            assert "data.jsonl:1: invalid JSON" in process.stderr.readline()
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
        assert process.stderr.read() == "interrupted\n"
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_feedback_that_cannot_be_read_is_one_line_and_exit_code_2(exported, tmp_path, command, monkeypatch):
    def fail(file):
        raise PermissionError(13, "Permission denied", str(file.path))

    monkeypatch.setattr(score.files, "read_rows", fail)
    data = write(tmp_path / "data.jsonl", ROWS)
    code, said = command(f"--model={exported[0]}", f"--data={data}", f"--out={tmp_path / 'scored.jsonl'}")
    assert code == 2 and "error: the feedback cannot be read: [Errno 13] Permission denied" in said
    assert os.listdir(tmp_path) == ["data.jsonl"]
