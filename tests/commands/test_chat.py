"""The chat command in a terminal, on a tiny random model, and what it refuses."""

import io
import json

import pytest

from kto_jax import chat
from kto_jax.config import ConfigError
from kto_jax.train import main as train
from tests import ROOT
from tests.sampling.tiny import export


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
