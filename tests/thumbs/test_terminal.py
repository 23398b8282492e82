"""Chatting and pressing in a terminal."""

import io
import json

import pytest

from kto_jax.thumbs.asking import Models
from kto_jax.thumbs.models import Settings
from kto_jax.thumbs.presses import Presses
from kto_jax.thumbs.terminal import Terminal
from tests.thumbs.scripted import Scripted


@pytest.fixture
def talk(tmp_path):
    def run(mode, *lines):
        presses, written = Presses(tmp_path / f"{mode}.jsonl"), io.StringIO()
        models = Models({name: Scripted(name) for name in ("policy", "reference")})
        settings = Settings(max_new_tokens=32)
        Terminal(models, presses, mode=mode, settings=settings, system="", write=written).read(iter(lines))
        rows = presses.path.read_text().splitlines() if presses.path.exists() else []
        return written.getvalue(), [json.loads(row) for row in rows]

    return run


def test_an_answer_is_streamed_and_pressed_on(talk):
    written, rows = talk(
        "policy", "Hello?", "/down", "/edit Hi.", "/withdraw", "/withdraw", "/again", "/up", "/quit", "x"
    )
    assert written.count("policy read 1 messages: Hello?\n") == 2
    assert [row["press"] for row in rows] == ["down", "edit", "withdraw", "withdraw", "up"]
    assert [row.get("of") for row in rows[2:4]] == ["edit", "thumb"] and rows[1]["completion"] == "Hi."
    assert "x" not in written.splitlines()


def test_two_answers_are_compared_before_they_are_named(talk):
    written, rows = talk("both", "Hello?", "/right", "/left-up", "/right-down", "/tie", "/withdraw")
    before, _, after = written.partition("(saved in")
    assert "left: " in before and "right: " in before and "(left:" not in before and "(left: " in after
    assert [row["press"] for row in rows] == ["choice", "up", "down", "tie", "withdraw"]
    assert rows[0]["better"] == rows[2]["completion"] and rows[0]["worse"] == rows[1]["completion"]


def test_settings_and_conversations_change(talk):
    written, rows = talk("policy", "/system Be brief.", "Hello?", "/temperature 0", "/new", "One", "Two", "/up")
    assert "policy read 2 messages: Hello?" in written and "policy read 4 messages: Two" in written
    assert rows[0]["by"]["temperature"] == 0 and rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_mistakes_are_explained_and_the_next_line_is_read(talk, monkeypatch):
    written, rows = talk(
        "policy", "/up", "/sideways", "/temperature hot", "/withdraw", "Hello?", "/left", "/help", "/up"
    )
    for said in ("There is no such answer here", "/sideways is no command", "Allowed: 0 or a positive",
                 "nothing to withdraw", "A choice needs two", "/withdraw  "):  # fmt: skip
        assert said in written
    assert len(rows) == 1
    monkeypatch.setattr(
        "kto_jax.thumbs.presses.os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    written, rows = talk("policy", "Hello?", "/down", "Go on")
    assert "(not saved: [Errno 28] No space left" in written and "read 3 messages" in written and len(rows) == 1


def test_an_answer_cannot_steer_the_terminal(talk):
    written, _ = talk("policy", "a\x1b[2J")
    assert r"a\x1b[2J" in written and "\x1b" not in written
