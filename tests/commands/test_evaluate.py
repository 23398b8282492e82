"""The command that evaluates: files of outputs, a model against another one, and the checkpoints of a run."""

import json
import math

import pytest

from kto_jax import evaluate
from kto_jax.data.tokens.tokenizer import make_encoder
from kto_jax.data.tokens.transcript import read_turns
from kto_jax.train import main as train
from tests import ROOT
from tests.evaluation.judge_server import longer_wins, serve  # noqa: F401 (a fixture)
from tests.sampling.tiny import export


@pytest.fixture
def command(capsys):
    """Runs the command in this process; gives its exit code, what it prints and its errors."""

    def run(*arguments):
        code = evaluate.main(arguments)
        return code, *capsys.readouterr()

    return run


def write_outputs(folder, name, texts):
    rows = [{"instruction": f"prompt {i}", "output": text, "generator": name} for i, text in enumerate(texts)]
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder / f"{name}.json"


def test_two_files_of_outputs_are_judged_without_a_model(tmp_path, command):
    ours = write_outputs(tmp_path, "new", ["one two three"] * 30 + ["one"] * 10)
    theirs = write_outputs(tmp_path, "old", ["one"] * 40)
    code, said, _ = command(
        f"--model={ours}", f"--against={theirs}", "--judge=min_words(2)", "--judge=vader", f"--out={tmp_path}/out"
    )
    assert code == 0
    assert "new wins 88 % of 40 pairs against old by min_words(2) (95 % interval 80 to 94 %): " in said
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (contest,) = record["contests"]
    assert [judge["judge"] for judge in contest["judges"]] == ["min_words(2)", "vader"]
    assert contest["judges"][0]["rate"]["value"] == 0.875 and contest["judges"][0]["ties"] == 10
    assert contest["texts"]["evaluated"]["words"] == 2.5
    assert len(json.loads((tmp_path / "out" / "annotations.json").read_text())) == 80
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "new wins 88 % of 40 pairs" in page and page.count('<article class="card sample"') == 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run"))[0]


def test_a_model_completes_the_prompts_of_a_file_and_equals_itself(exported, tmp_path, command):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Name film {i}."}) + "\n" for i in range(3)))
    flags = [f"--prompts={prompts}", "--judge=min_words(2)", "--max_new_tokens=6", "--max_prompts=2"]
    code, said, errors = command(f"--model={exported}", f"--against={exported}", *flags, f"--out={tmp_path}/out")
    assert "completes the first 2 of 3 prompts" in errors
    assert code == 0 and "do not rely on it yet, because 2 prompts are few" in said
    (contest,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["contests"]
    assert contest["judges"][0]["ties"] == contest["pairs"] == 2
    assert contest["divergence"]["per_completion"]["value"] == pytest.approx(0, abs=1e-4)
    rows = json.loads((tmp_path / "out" / "outputs_evaluated.json").read_text())
    assert rows == json.loads((tmp_path / "out" / "outputs_baseline.json").read_text())


def test_a_language_model_is_asked_only_after_its_cost_was_shown(tmp_path, command, serve):  # noqa: F811
    server = serve(longer_wins)
    ours, theirs = write_outputs(tmp_path, "new", ["longer"] * 25), write_outputs(tmp_path, "old", ["short"] * 25)
    flags = [f"--model={ours}", f"--against={theirs}", f"--judge={server.url}", f"--out={tmp_path}/out"]
    code, _, errors = command(*flags, "--judge_price=2,10")
    assert code == 0 and "50 questions, two for each pair" in errors and "at most $" in errors
    assert "nothing was asked: add --yes" in errors
    assert server.questions == [] and not (tmp_path / "out").exists()
    code, said, _ = command(*flags, "--yes")
    assert code == 0 and f"new wins 100 % of 25 pairs against old by model at {server.url}" in said
    assert len(server.questions) == 50
    server.reply = lambda *_: (500, "down")
    code, said, _ = command(*flags, "--yes")
    assert code == 0 and len(server.questions) == 50  # all cached


def test_completions_are_kept_if_the_judge_is_down(tmp_path, command, serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate.Endpoint, "__init__", _impatient(evaluate.Endpoint.__init__))
    server = serve(lambda *_: (503, "down"))
    ours, theirs = write_outputs(tmp_path, "new", ["a"]), write_outputs(tmp_path, "old", ["b"])
    code, _, errors = command(
        f"--model={ours}", f"--against={theirs}", f"--judge={server.url}", "--yes", f"--out={tmp_path}/out"
    )
    assert code == 75 and "failed 2 times (503: " in errors and "Its answers so far are kept" in errors
    assert (tmp_path / "out" / "outputs_evaluated.json").exists()


def _impatient(init):
    def impatient(self, *arguments, **options):
        init(self, *arguments, **{**options, "attempts": 2, "first_wait": 0.0})

    return impatient


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--run='' and --model='' were given"),
        (["--run=r", "--model=m"], "one of the two"),
        (["--model=m"], "without --judge"),
        (["--model=m", "--judge=vader"], "--against=reference"),
        (["--model=m", "--against=n", "--judge=vader"], "without --prompts"),
        (["--model=m", "--against=n", "--judge=vader", "--prompts=p", "--steps=all"], "Only a run has steps"),
        (["--model=m", "--against=n", "--judge=vader", "--prompts={bad}"], ":2: the prompt is ''"),
        (["--model=m", "--against=n", "--judge=vader", "--prompts=p", "--judge_price=1"], "--judge_price='1' cannot"),
        (["--run={folder}"], "is not the folder of a run"),
        (["--run=gs://bucket/run"], "Set --out"),
        (["--model={new}", "--against={new}", "--judge=vadr"], "--judge='vadr' is no reward"),
        (["--model={new}", "--against=none", "--judge=vader", "--prompts={good}"], "none does not exist"),
    ],
)
def test_an_unusable_command_is_refused_with_exit_code_2(tmp_path, command, flags, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    values = {"bad": tmp_path / "bad.jsonl", "good": tmp_path / "good.jsonl", "folder": tmp_path}
    values["new"] = write_outputs(tmp_path, "new", ["a"])
    code, _, errors = command(*(flag.format(**values) for flag in flags))
    assert code == 2 and message in errors


def test_a_rendered_prompt_is_read_back_as_its_turns(tmp_path):
    tokenizer = export(tmp_path)[3]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are\nyou?"}]
    prompt, _ = make_encoder(tokenizer).encode_row(chat, "Fine.")
    assert read_turns(tokenizer, prompt) == chat
    plain = make_encoder(tokenizer).encode_row("x", "y")[1]
    assert isinstance(read_turns(tokenizer, plain), str)


@pytest.mark.parametrize(
    "objective",
    [
        ["kto"],
        *(
            pytest.param(each, marks=pytest.mark.exhaustive)
            for each in (["kto", "--config.lora.rank=2"], ["bco"], ["sft"])
        ),
    ],
)
def test_the_checkpoints_of_a_run_are_evaluated_as_a_curve(tmp_path, monkeypatch, command, objective):
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    name, *more = objective
    run = tmp_path / "run"
    assert train(
        ["--config=configs/tiny.py", "--config.max_steps=6", "--config.checkpoint.every=3",
         "--config.checkpoint.keep=9",
         "--config.data.judge_holdout=0.2", "--config.data.holdout=0.2", "--config.evaluation.every=3",
         f"--config.objective.name={name}", f"--workdir={run}", *more]
    ) == 0  # fmt: skip
    code, said, errors = command(
        f"--run={run}",
        "--steps=all",
        "--judge=feedback",
        "--judge=max_words(6)",
        "--max_new_tokens=8",
        "--num_samples=2",
    )
    assert code == 0, errors
    record = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [figures["step"] for figures in record["held_out"]] == [3, 6]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for figures in record["held_out"]:
        row = next(row for row in logged if row["step"] == figures["step"] and "eval_loss" in row)
        assert figures["loss"] == pytest.approx(row["eval_loss"], rel=1e-4)
        assert figures["auc"]["value"] == pytest.approx(row["eval_auc"], abs=1e-3)
        assert figures["margin"] == pytest.approx(row["eval_margin"], rel=1e-2, abs=1e-5)
        assert (figures["ranking"] is None) == (name == "sft")
    assert len(record["contests"]) == 2
    divergence = record["contests"][1]["divergence"]["per_completion"]
    assert math.isfinite(divergence["value"]) and divergence["low"] < divergence["high"]
    assert "fitted on" in said and "held-out loss" in said
    assert errors.count("uses 1 of 8 devices; --devices=all uses all\n") == 1
    assert "Win rate by step" in (run / "evaluation" / "evaluation.html").read_text()
    if objective == ["bco"]:
        steps = ["--max_new_tokens=8", "--num_samples=2", "--judge=max_words(6)"]
        code, _, errors = command(f"--run={run}", *steps, "--devices=all", f"--out={tmp_path}/all")
        assert code == 0 and errors.count("uses 8 of 8 devices: ") == 1
        for ours, theirs in (("outputs_evaluated_6", "outputs_evaluated"), ("outputs_baseline", "outputs_baseline")):
            one, several = run / "evaluation" / f"{ours}.json", tmp_path / "all" / f"{theirs}.json"
            assert json.loads(one.read_text()) == json.loads(several.read_text())
