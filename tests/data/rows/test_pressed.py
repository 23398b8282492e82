"""Presses of the chat page: which count, what they say as thumbs and as pairs, and what is skipped and why."""

import json

from kto_jax.config import DataConfig
from kto_jax.data.rows import pressed
from kto_jax.data.rows.files import SourceFile, read_rows
from kto_jax.data.rows.records import Feedback, Preference, Rejection, read_as

PROMPT = [{"role": "user", "content": "Q?"}]


def thumb(press, answer, completion="A.", **fields):
    return {"press": press, "answer": answer, "prompt": PROMPT, "completion": completion, "ended": True, **fields}


def edit(answer, completion, original="A.", **fields):
    return {**thumb("edit", answer, completion, original=original), **fields}


def choice(comparison, better, worse, answers, **fields):
    sides = {"better": better, "worse": worse, "answers": answers}
    return {"press": "choice", "comparison": comparison, "prompt": PROMPT, "ended": True, **sides, **fields}


def withdraw(of, about):
    return {"press": "withdraw", "of": of, "comparison" if of == "choice" else "answer": about}


def read(rows, **settings):
    places = [(f"a:{i}", row) for i, row in enumerate(rows, start=1)]
    found = read_as(iter(places), DataConfig(**settings))
    assert found.layout == "presses"
    said = []
    for record in found.records:
        if isinstance(record, Feedback):
            said.append((record.completion, record.desirable))
        elif isinstance(record, Preference):
            said.append((record.chosen.completion, record.rejected.completion))
        else:
            said.append(record.reason)
    return said


def test_the_last_press_of_a_kind_on_an_answer_counts_and_the_others_are_counted():
    rows = [
        thumb("up", "a1"),
        thumb("up", "a2", "B."),
        thumb("down", "a1"),
        thumb("up", "a3", "C."),
        withdraw("thumb", "a3"),
        thumb("down", "a4", "D."),
        withdraw("thumb", "a4"),
        thumb("up", "a4", "D."),
    ]
    assert read(rows) == [
        pressed.REPLACED, ("B.", True), ("A.", False), pressed.WITHDRAWN, pressed.WITHDRAWAL, pressed.WITHDRAWN,
        pressed.WITHDRAWAL, ("D.", True),
    ]  # fmt: skip


def test_an_edit_is_a_pair_and_two_thumbs_unless_the_original_has_one_of_its_own():
    alone, thumbed = edit("a1", "B."), edit("a2", "D.", "C.")
    rows = [alone, thumbed, thumb("up", "a2", "C.")]
    assert read(rows) == [("B.", True), ("A.", False), ("D.", True), ("C.", True)]
    assert read(rows, format="pairs") == [
        ("B.", "A."),
        ("D.", "C."),
        "a thumb, which data.format='thumbs' reads",
    ]
    assert read([*rows, withdraw("edit", "a1"), edit("a2", "E.", "C.")], format="pairs") == [
        pressed.WITHDRAWN, pressed.REPLACED, "a thumb, which data.format='thumbs' reads", pressed.WITHDRAWAL,
        ("E.", "C."),
    ]  # fmt: skip


def test_a_choice_is_a_pair_and_two_thumbs_unless_its_answers_have_presses_that_say_more():
    rows = [choice("c1", "A.", "B.", ["a1", "a2"])]
    assert read(rows, format="pairs") == [("A.", "B.")]
    assert read(rows) == [("A.", True), ("B.", False)]
    assert read([*rows, thumb("up", "a2", "B.")]) == [("A.", True), ("B.", True)]
    assert read([*rows, edit("a1", "C.")]) == [("B.", False), ("C.", True), ("A.", False)]
    assert read([*rows, thumb("up", "a1"), thumb("up", "a2", "B.")])[0].startswith("a choice between answers that")
    tie = {"press": "tie", "comparison": "c1"}
    assert read([*rows, tie]) == [pressed.REPLACED, "a tie"]
    assert read([*rows, tie, withdraw("choice", "c1")]) == [pressed.REPLACED, pressed.WITHDRAWN, pressed.WITHDRAWAL]


def test_presses_on_answers_that_were_cut_are_skipped_but_the_edited_text_is_whole():
    rows = [thumb("up", "a1", ended=False), edit("a2", "B.", ended=False), choice("c", "A.", "B.", [], ended=False)]
    cut = pressed.CUT_ANSWER
    assert read(rows) == [cut, ("B.", True), cut, cut, cut]
    assert read(rows, format="pairs") == ["a thumb, which data.format='thumbs' reads", cut, cut]


def test_a_press_that_was_written_twice_counts_once():
    row = thumb("up", "a1", id="p1")
    assert read([row, row, thumb("down", "a2", id="p2")]) == [pressed.TWICE, ("A.", True), ("A.", False)]


def test_rows_that_are_no_presses_are_rejected_and_a_line_that_was_cut_is_skipped(tmp_path):
    rows = [thumb("up", "a1"), {"press": "sideways", "answer": "a2"}, {"press": "up"}, thumb("down", "a3")]
    path = tmp_path / "presses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"press": "up", "ans')
    found = read_as(read_rows(SourceFile(path, "p")), DataConfig(layout="presses"))
    records = list(found.records)
    assert [type(record) for record in records[1:3]] == [Rejection, Rejection]
    assert "'sideways' is none of up, down, edit, choice, tie, withdraw" in records[1].reason
    assert records[4].reason == pressed.CUT_LINE and records[4].place == "p:5"
    counted = pressed.count(read_rows(SourceFile(path, "p")))
    assert counted == {"up": 1, "down": 1, pressed.CUT_LINE: 1}
