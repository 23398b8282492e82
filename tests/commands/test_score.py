"""The command that scores completions, on a tiny random reward model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from kto_jax import score
from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows import records
from kto_jax.data.rows.files import Rejection
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from tests import ROOT

TINY = ROOT / "configs" / "tiny_model"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
ROWS = [
    {"prompt": "Name a film.", "completion": "Jaws.", "id": 7, "weight": "broken"},
    {"prompt": CHAT, "completion": [{"role": "assistant", "content": "Fine, and you? " * 12}], "label": True},
    {"prompt": "Name a film.", "completion": "Heat, of course, what else could it be?", "note": "\ud800"},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run's folder with a reward model as training exports it, and its model, parameters and tokenizer."""
    run = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(read_config(TINY), initializer_range=0.2)
    model = Model.create(config, scorer="reward", remat="none")
    params = model.init_params(jax.random.key(0), "float32")
    tokenizer = tokenize.prepare_tokenizer(TINY, run / "tokenizer", chat_template="auto")
    save_hugging_face(run / "policy", model, params, tokenizer_dir=tokenizer.directory, model_card="tiny")
    return run, model, params, tokenizer


def naive(model, params, ids):
    """The score of one sequence, by itself and unpadded."""
    tokens = jnp.asarray(ids)[None]
    hidden_states = jax.jit(model.hidden_states)
    hidden = hidden_states(params, tokens, jnp.ones_like(tokens), jnp.arange(tokens.size)[None])
    return float(hidden[0, -1].astype(jnp.float32) @ params["scorer"]["weight"])


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def places(rows):
    return [(f"x:{number}", row) for number, row in enumerate(rows, start=1)]


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
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, capture_output=True, text=True,
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


def test_scores_do_not_depend_on_the_batch_and_few_shapes_are_compiled(exported):
    _, model, params, _ = exported
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 512, size) for size in (1, 64, 65, 200, 64, 65, 1)]
    score._score_batch.clear_cache()
    found = score.score_sequences(model, params, sequences, batch_size=2)
    assert score._score_batch._cache_size() == 3  # Lengths 64, 128 and 256.
    np.testing.assert_allclose(found, [naive(model, params, ids) for ids in sequences], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(score.score_sequences(model, params, sequences, batch_size=5), found, atol=1e-5)
    assert score.score_sequences(model, params, [], batch_size=2).shape == (0,)


def test_a_long_prompt_is_cut_from_the_left_as_in_training(exported):
    _, model, params, tokenizer = exported
    data = DataConfig(max_length=40, max_prompt_length=20)
    rows = places([{"prompt": "word " * 100, "completion": "Good."}])
    (row,) = score.score_rows(model, params, tokenizer, rows, data, batch_size=2)
    prompt, completion = tokenize.make_encoder(tokenizer).encode_row("word " * 100, "Good.")
    start = [] if prompt[0] != tokenizer.bos_id else [tokenizer.bos_id]
    kept = np.concatenate([start, prompt[len(prompt) - 20 + len(start) :], completion]).astype(int)
    np.testing.assert_allclose(row["score"], naive(model, params, kept), rtol=1e-4)


def test_rows_that_cannot_be_scored_are_left_out_and_told_with_their_place(exported, tmp_path, command, monkeypatch):
    monkeypatch.setattr(score, "_BATCHES_READ_AHEAD", 1)  # Several chunks.
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
    lines = said.splitlines()
    for line, (number, reason) in zip(
        lines, [(1, "invalid JSON"), (3, "empty completion"), (4, "not an object"), (5, "missing field 'completion'"),
                (7, "completion longer than max_length")], strict=False,
    ):  # fmt: skip
        assert line.startswith(f"{data}:{number}: ") and reason in line
    assert lines[5:] == ["2 rows scored, 5 rejected"]


def test_a_file_of_which_nothing_can_be_scored_is_exit_code_1_and_leaves_what_was_there(exported, tmp_path, command):
    data = write(tmp_path / "data.jsonl", ["{", {"prompt": "x", "completion": ""}])
    out = write(tmp_path / "scored.jsonl", ["earlier"])
    code, said = command(f"--model={exported[0] / 'policy'}", f"--data={data}", f"--out={out}")
    assert code == 1 and "0 rows scored, 2 rejected" in said
    assert out.read_text() == "earlier\n"
    assert {file.name for file in tmp_path.iterdir()} == {"data.jsonl", "scored.jsonl"}


def test_a_score_that_is_not_finite_is_a_rejection(exported):
    _, model, params, tokenizer = exported
    broken = params | {"scorer": {"weight": params["scorer"]["weight"] * jnp.inf}}
    (row,) = score.score_rows(model, broken, tokenizer, places(ROWS[:1]), DataConfig(), batch_size=2)
    assert isinstance(row, Rejection) and row.place == "x:1" and row.reason.startswith("its score is ")


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no reward model. Allowed: .* Choose another --model"):
        score.open_reward_model(str(TINY), dtype="float32")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="a run without a policy/ yet"):
        score.open_reward_model(str(tmp_path), dtype="float32")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x", "text": "y"},
            r"x:1 has no field 'completion'\. Its fields are 'prompt', 'text'\. Set --prompt",
        ),
        ({"prompt": "x", "completion": "y", "score": 3}, r"x:1 has a field 'score' already\..*Set --score_field"),
    ],
)
def test_rows_without_the_fields_or_with_a_rating_already_are_refused(exported, row, message):
    _, model, params, tokenizer = exported
    with pytest.raises(ConfigError, match=message):
        list(score.score_rows(model, params, tokenizer, places([row]), DataConfig(), batch_size=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=m"], "--data, --out not given"),
        (["--model=m", "--data={data}", "--out={data}"], "is --data or a directory"),
        (["--model=m", "--data={data}", "--out={directory}"], "is --data or a directory"),
        (["--model={model}", "--data={data}", "--out={directory}/none/x.jsonl"], "--out cannot be written"),
        (["--model={model}", "--data={data}", "--out={directory}/x", "--max_length=4000"], "context of 2048 tokens"),
        (["--model={model}", "--batch_size=0"], "batch_size"),
        (["data.jsonl"], "is not a flag"),
        (["--model=m", "--data={data}", "--out=x", "--config=configs/tiny.py"], "--data and --config are given"),
        (["--model=m", "--config=configs/tiny.py"], "--out not given"),
        (["--model=m", "--config=configs/tiny.py", "--config.data.trian=x", "--out=x"], "Did you mean 'train'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(exported, tmp_path, command, arguments, message):
    data = write(tmp_path / "data.jsonl", ROWS)
    values = {"model": exported[0], "data": data, "directory": tmp_path}
    code, said = command(*(argument.format(**values) for argument in arguments))
    assert code == 2 and said.startswith("error: ") and message in said
    assert len(data.read_text().splitlines()) == len(ROWS)


def test_whatever_training_reads_is_scored_one_row_for_every_completion(exported, tmp_path, command):
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


def test_ratings_of_a_configuration_are_not_written_over(exported, tmp_path):
    rated = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A", "score": 2}])
    with pytest.raises(ConfigError, match=r"a.jsonl:1 has a field 'score' already"):
        list(score.completions_to_score(DataConfig(train=str(rated), format="scores"), "score"))
    # What is held out is not read.
    data = DataConfig(train=str(rated), eval=str(rated), format="scores")
    ((row, _),) = score.completions_to_score(data, "reward")
    assert row["score"] == 2.0


def test_a_run_is_scored_with_the_lengths_and_the_eos_that_it_trained_with(tmp_path):
    defaults = {"max_length": 1024, "max_prompt_length": 512, "eos_token": "auto"}
    assert score._data_of_run(str(tmp_path)) == defaults
    shutil.copytree(ROOT / "configs" / "tiny_model", tmp_path / "policy")
    # As a run of before there was data.eos_token left it.
    (tmp_path / "config.json").write_text(json.dumps({"data": {"max_length": 99, "max_prompt_length": 11}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"eos_id": 0}}))
    token = tokenizers.Tokenizer.from_file(str(tmp_path / "policy" / "tokenizer.json")).id_to_token(0)
    for path in (tmp_path, tmp_path / "policy"):
        found = score._data_of_run(str(path))
        assert found == {"max_length": 99, "max_prompt_length": 11, "eos_token": token} and token
