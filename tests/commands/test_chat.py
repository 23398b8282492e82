"""The chat command in a terminal, on a tiny random model, and what it refuses."""

import io
import json

import pytest

from kto_jax import chat
from kto_jax.config import ConfigError
from kto_jax.thumbs.models import LocalModel
from kto_jax.train import main as train
from tests import ROOT
from tests.sampling.tiny import export
from tests.thumbs.test_endpoint import served  # noqa: F401 (a fixture)


@pytest.mark.parametrize(("flags", "message"), [
    ({}, "exactly one of the two"),
    ({"model": "m", "endpoint": "http://x"}, "exactly one of the two"),
    ({"endpoint": "http://x", "terminal": True, "answers": "both"}, "which is one model"),
    ({"model": "m", "recipe": "kto_caht"}, "Did you mean 'kto_chat'"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(monkeypatch, flags, message):
    monkeypatch.setattr(chat, "require", lambda *_: None)
    with pytest.raises(ConfigError, match=message):
        chat._check(chat.Options(**flags))


def test_a_page_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("kto_jax.config.packages.is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"the chat page needs .* pip install gradio, or add --terminal"):
        chat._check(chat.Options(model="m"))


def test_a_training_starts_from_the_exported_policy(tmp_path):
    assert chat._start_of("org/name") == ("org/name", "")
    (tmp_path / "checkpoints").mkdir()
    start, why_not = chat._start_of(str(tmp_path))
    assert start == "" and why_not.startswith(f"{tmp_path} has only checkpoints.")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    assert chat._start_of(str(tmp_path)) == (f"{tmp_path}/policy", "")


def test_a_conversation_in_a_terminal_is_pressed_and_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    model = export(tmp_path / "model")[0] / "policy"
    lines = ["Name a tree.", "/up", "Name a bird.", "/down", "/edit A wren.", "/nonsense", "/quit"]
    monkeypatch.setattr("secrets.randbits", lambda bits: 1)  # Some answers of this model cannot be trained on.
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert chat.main(
        [f"--model={model}", "--terminal", f"--workdir={tmp_path}", "--max_new_tokens=64", "--temperature=1"]
    ) == 0  # fmt: skip
    assert "/nonsense is no command" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "presses.jsonl").read_text().splitlines()]
    assert [row["press"] for row in rows] == ["up", "down", "edit"] and rows[0]["by"]["model"] == str(model)
    # This model hardly ever ends an answer, and answers that were cut are not trained on.
    whole = (tmp_path / "presses.jsonl").read_text().replace('"ended": false', '"ended": true')
    (tmp_path / "presses.jsonl").write_text(whole)
    assert train(
        ["--config=configs/kto_chat.py", f"--config.data.train={tmp_path}/presses.jsonl",
         f"--config.model.path={model}", f"--workdir={tmp_path}/run", "--config.batch_size=8",
         "--config.microbatch_rows=8", "--config.data.max_length=128",
         "--config.data.max_prompt_length=96", "--config.epochs=1"]
    ) == 0  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["sources"][0]["layout"] == "presses"
    assert (manifest["accepted"], manifest["rejected"]) == (3, 0)


def test_a_token_is_asked_for_wherever_others_could_come_from(monkeypatch):
    assert chat._token(chat.Options()) == ""
    random = {chat._token(chat.Options(host="0.0.0.0")) for _ in range(2)}
    assert len(random) == 2 and all(len(token) == 32 for token in random)
    monkeypatch.setenv(chat.TOKEN, "short")
    with pytest.raises(ConfigError, match=r"KTO_JAX_CHAT_TOKEN has 5 characters .* at least 16"):
        chat._token(chat.Options(host="0.0.0.0"))


def test_an_endpoint_is_asked_in_a_terminal_and_its_answers_are_pressed(served, tmp_path, monkeypatch, capsys):  # noqa: F811
    kind, url = served
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n/up\n"))
    command = [f"--endpoint={url}", "--terminal", f"--workdir={tmp_path}", "--system=Be kind.", "--temperature=0"]
    assert chat.main(command) == 0
    said = capsys.readouterr()
    assert "Hi there" in said.out and f"presses go to {tmp_path}/presses.jsonl; /help lists the commands" in said.err
    (row,) = [json.loads(line) for line in (tmp_path / "presses.jsonl").read_text().splitlines()]
    assert (row["press"], row["completion"], row["by"]["model"]) == ("up", "Hi there", "one")
    assert kind.seen[1]["messages"] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"},
    ]  # fmt: skip


def test_an_endpoint_that_does_not_answer_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert chat.main(["--endpoint=http://127.0.0.1:9/v1", "--terminal", f"--workdir={tmp_path}"]) == 75
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert not (tmp_path / "presses.jsonl").exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a policy; makes its config.json say where it started. No answer is drawn."""
    monkeypatch.setattr(LocalModel, "warm_up", lambda self: None)
    folder = export(tmp_path / "run")[0]

    def started_from(path, init="pretrained"):
        recorded = {"model": {"path": str(path), "init": init}, "reference": {"path": ""}}
        (folder / "config.json").write_text(json.dumps(recorded))
        return folder

    return started_from


def test_the_model_that_a_run_started_from_is_its_reference(run):
    folder = run("")
    folder = run(folder / "policy")
    with chat._open_models(chat.Options(model=str(folder))) as (models, reload):
        assert models.modes == ["policy", "reference", "both"]
        policy, reference = models.by_role.values()
        assert reference.name == str(folder / "policy")
        # A reference and a policy that was trained meanwhile read conversations as the policy does.
        trained = reload(folder / "policy")
        assert trained.model.tokenizer is reference.model.tokenizer is policy.model.tokenizer
    with chat._open_models(chat.Options(model=str(folder), reference="none")) as (models, _):
        assert models.modes == ["policy"]


def test_a_run_that_kept_no_reference_chats_alone_and_says_why(run, tmp_path, monkeypatch, capsys):
    command = [f"--model={run('', 'random')}", "--terminal", f"--workdir={tmp_path / 'chat'}"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    assert chat.main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the policy answers alone: the run" in said and "started from random weights" in said
    assert chat.main([*command, "--answers=both"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--answers=both was given, and only the policy can answer. Allowed: auto, policy; and" in said
    assert "Set --reference or --answers." in said


def test_a_program_that_holds_a_tpu_trains_nothing(monkeypatch):
    monkeypatch.setattr("kto_jax.chat.jax.default_backend", lambda: "tpu")
    start, why_not = chat._start_of("org/name")
    assert start == "" and "End this program, and run kto_jax.train." in why_not


def test_a_training_reads_conversations_with_the_template_of_the_page():
    assert chat._settings(chat.Options()) == {}
    assert chat._settings(chat.Options(chat_template="own.jinja")) == {"data.chat_template": "own.jinja"}
