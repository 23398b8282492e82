"""Conversations: what is asked, what is pressed, and what is on disk then."""

import copy
import errno
import json
import threading

import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.files import SourceFile, read_rows
from kto_jax.data.rows.records import Feedback, Preference, read_as
from kto_jax.thumbs.asking import Models
from kto_jax.thumbs.conversation import Answer, Conversation
from kto_jax.thumbs.models import Piece, Settings
from kto_jax.thumbs.presses import Presses
from tests.thumbs.scripted import Scripted

SETTINGS = Settings(temperature=0.5, max_new_tokens=32)


@pytest.fixture
def presses(tmp_path):
    return Presses(tmp_path / "presses.jsonl")


@pytest.fixture
def models():
    return Models({name: Scripted(name) for name in ("policy", "reference")})


def rows_of(presses):
    return [json.loads(line) for line in presses.path.read_text().splitlines()] if presses.path.exists() else []


def read(presses, **settings):
    file = SourceFile(presses.path, "p")
    found = []
    for record in read_as(read_rows(file), DataConfig(**settings)).records:
        if isinstance(record, Feedback):
            found.append((record.completion, record.desirable))
        elif isinstance(record, Preference):
            found.append((record.chosen.completion, record.rejected.completion))
    return found


def ask(models, conversation, said, mode="policy"):
    return list(models.ask(conversation, said, mode, SETTINGS))[-1]


def test_an_answer_streams_into_the_conversation_and_the_next_prompt_has_it(presses, models):
    conversation = Conversation(presses, " Be brief. ")
    sizes = [len(turn.answers[0].text) for turn in models.ask(conversation, "Hello?", "policy", SETTINGS)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 6
    turn = ask(models, conversation, "And now?", "reference")
    assert [message["content"] for message in turn.prompt] == [
        "Be brief.", "Hello?", "policy read 2 messages: Hello?", "And now?",
    ]  # fmt: skip
    assert turn.answers[0].text == "reference read 4 messages: And now?"
    assert (turn.answers[0].role, turn.answers[0].ended, turn.answers[0].num_tokens) == ("reference", True, 6)


def test_a_stopped_answer_takes_no_more_and_what_is_asked_then_stays(presses, models):
    conversation = Conversation(presses)
    stopped = models.ask(conversation, "Hello?", "policy", SETTINGS)
    assert [next(stopped).answers[0].text for _ in range(3)] == ["", "policy", "policy read"]
    assert conversation.is_growing
    conversation.stop()
    assert not conversation.is_growing
    later = ask(models, conversation, "And now?")
    assert list(stopped) == []
    assert [turn.answers[0].text for turn in conversation.turns] == ["policy read", later.answers[0].text]


def test_a_turn_that_is_stopped_before_its_first_word_is_taken_back_alone(presses, models):
    conversation = Conversation(presses)
    stopped = models.ask(conversation, "Hello?", "policy", SETTINGS)
    next(stopped)
    conversation.stop()
    later = ask(models, conversation, "And now?")
    stopped.close()  # as late as a server may
    assert conversation.turns == [later] and len(later.prompt) == 1


def test_what_is_expected_is_begun_once_and_not_after_a_stop(presses, models):
    conversation = Conversation(presses)
    assert conversation.expect(models.ask(conversation, "Hello?", "policy", SETTINGS))
    assert conversation.is_growing and not conversation.expect(iter(()))
    conversation.stop()
    assert not conversation.is_growing and list(conversation.expected()) == [] and conversation.turns == []
    assert conversation.expect(models.ask(conversation, "Hello?", "policy", SETTINGS))
    assert list(conversation.expected())[-1].answers[0].ended and list(conversation.expected()) == []


def test_an_answer_that_cannot_be_begun_leaves_the_conversation_free(presses, models):
    conversation = Conversation(presses)
    assert conversation.expect(models.again(conversation, 3, "policy", SETTINGS))
    with pytest.raises(ConfigError, match="There is no such answer here"):
        list(conversation.expected())
    assert not conversation.is_growing


def test_a_stop_waits_for_an_answer_that_is_just_being_begun(presses):
    conversation, begun, stopped = Conversation(presses), threading.Event(), threading.Event()
    models = Models({"policy": Scripted("policy", lambda last: stopped.wait())})

    def views():
        begun.wait()
        yield from models.ask(conversation, "Hello?", "policy", SETTINGS)

    conversation.expect(views())
    found = []
    beginner = threading.Thread(target=lambda: found.extend(conversation.expected()))
    stopper = threading.Thread(target=conversation.stop)
    beginner.start()
    while not conversation._lock._is_owned() and conversation._lock.acquire(blocking=False):
        conversation._lock.release()
    stopper.start()
    stopper.join(0.2)  # It waits, and would wait longer.
    begun.set()
    stopper.join()
    stopped.set()
    beginner.join()
    assert not conversation.is_growing and len(found) < 3


def test_a_turn_is_asked_again_with_another_text(presses, models):
    conversation = Conversation(presses)
    for said in ("one", "two", "three"):
        ask(models, conversation, said)
    list(models.again(conversation, 1, "reference", SETTINGS, "other"))
    assert [turn.said for turn in conversation.turns] == ["one", "other"]
    list(models.again(conversation, 0, "reference", SETTINGS))
    assert [turn.said for turn in conversation.turns] == ["one"]
    assert conversation.turns[0].answers[0].text == "reference read 1 messages: one"


def test_two_answers_come_in_a_hidden_order_and_the_better_one_goes_on(presses, models):
    orders = set()
    for _ in range(40):
        conversation = Conversation(presses)
        turn = ask(models, conversation, "Hello?", "both")
        orders.add(tuple(answer.role for answer in turn.answers))
    assert orders == {("policy", "reference"), ("reference", "policy")}
    conversation.choose(0, 1)
    second = ask(models, conversation, "And now?", "both")
    assert second.prompt[1]["content"] == turn.answers[1].text
    # Choosing again later does not change what the second turn answered.
    conversation.choose(0, 0)
    assert second.prompt[1]["content"] == turn.answers[1].text
    assert read(presses, format="pairs") == [(turn.answers[0].text, turn.answers[1].text)]
    conversation.choose(0, "tie")
    assert read(presses, format="pairs") == []
    conversation.choose(0, 0)
    conversation.choose(0, None)
    assert read(presses, format="pairs") == []


def test_thumbs_and_edits_are_saved_and_withdrawn(presses, models):
    conversation = Conversation(presses)
    text = ask(models, conversation, "Hello?").answers[0].text
    conversation.press_thumb(0, 0, "up")
    conversation.press_thumb(0, 0, "down")
    assert read(presses) == [(text, False)]
    conversation.edit(0, 0, "Hi.")
    assert read(presses) == [(text, False), ("Hi.", True)] and read(presses, format="pairs") == [("Hi.", text)]
    with pytest.raises(ConfigError, match=r"An edited answer counts as good .* Edit it back"):
        conversation.press_thumb(0, 0, "up")
    assert ask(models, conversation, "Go on").prompt[1]["content"] == "Hi."
    conversation.press_thumb(0, 0, None)
    assert read(presses) == [("Hi.", True), (text, False)]
    conversation.edit(0, 0, text + "\n")
    assert read(presses) == [] and conversation.turns[0].answers[0].edited is None
    num_rows = len(rows_of(presses))
    conversation.press_thumb(0, 0, None)
    conversation.edit(0, 0, text)
    assert len(rows_of(presses)) == num_rows, "there was nothing to withdraw"
    row = rows_of(presses)[0]
    assert row["by"] == {"role": "policy", "model": "policy", "temperature": 0.5, "max_new_tokens": 32}
    assert row["conversation"] == conversation.id and row["prompt"] == [{"role": "user", "content": "Hello?"}]


def test_a_press_that_cannot_be_saved_changes_nothing(presses, models, monkeypatch):
    conversation = Conversation(presses)
    turn = ask(models, conversation, "Hello?", "both")

    def full(press):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(presses, "append", full)
    for press in (
        lambda: conversation.press_thumb(0, 0, "up"),
        lambda: conversation.edit(0, 0, "Hi."),
        lambda: conversation.choose(0, 1),
    ):
        with pytest.raises(OSError, match="No space left"):
            press()
    answer = turn.answers[0]
    assert (answer.thumb, answer.edited, turn.choice) == (None, None, None)


def test_presses_that_cannot_be_are_refused(presses, models):
    conversation = Conversation(presses)
    with pytest.raises(ConfigError, match="There is no such answer here"):
        conversation.press_thumb(0, 0, "up")
    ask(models, conversation, "Hello?")
    with pytest.raises(ConfigError, match="A choice needs two"):
        conversation.choose(0, 0)
    with pytest.raises(ConfigError, match="The edited answer is empty"):
        conversation.edit(0, 0, " ")
    conversation.begin("And?", [Answer("policy", "policy", SETTINGS)])
    with pytest.raises(ConfigError, match="There is no answer to press on"):
        conversation.press_thumb(1, 0, "up")
    same = Models({"policy": Scripted("one"), "reference": Scripted("one")})
    other = Conversation(presses)
    ask(same, other, "Hello?", "both")
    with pytest.raises(ConfigError, match="Both answers are the same"):
        other.choose(0, 0)
    other.choose(0, "tie")


def test_a_copy_is_a_conversation_of_its_own(presses, models):
    conversation = Conversation(presses, "Be brief.")
    ask(models, conversation, "Hello?")
    copied = copy.deepcopy(conversation)
    assert (copied.turns, copied.system) == ([], "Be brief.") and copied.id != conversation.id


def test_an_answer_that_is_still_being_written_takes_no_press(presses, models):
    conversation = Conversation(presses)
    stream = models.ask(conversation, "Hello?", "policy", SETTINGS)
    next(stream), next(stream)
    for press in (lambda: conversation.press_thumb(0, 0, "up"), lambda: conversation.edit(0, 0, "Hi.")):
        with pytest.raises(ConfigError, match=r"still being written\. .* Wait for its end, or stop it"):
            press()
    stream.close()
    conversation.press_thumb(0, 0, "up")
    assert [(row["completion"], row["ended"]) for row in rows_of(presses)] == [("policy", False)]


def test_asking_again_keeps_what_was_pressed_on_the_first_answer(presses, models):
    conversation = Conversation(presses)
    first = ask(models, conversation, "Hello?").answers[0]
    conversation.press_thumb(0, 0, "down")
    ask(models, conversation, "More")
    list(models.again(conversation, 0, "reference", SETTINGS))
    assert len(conversation.turns) == 1 and conversation.turns[0].answers[0].role == "reference"
    assert conversation.turns[0].answers[0].thumb is None
    assert read(presses) == [(first.text, False)]


class Failing:
    name = "failing"

    def __init__(self, after):
        self.after = after

    def stream(self, messages, settings, seed):
        for number in range(self.after):
            yield Piece("x" * (number + 1), number + 1)
        raise ConfigError("The conversation is too long.")


def test_a_turn_that_cannot_be_answered_is_taken_back_and_one_half_answered_counts_as_cut(presses):
    conversation = Conversation(presses)
    with pytest.raises(ConfigError, match="too long"):
        ask(Models({"policy": Failing(0)}), conversation, "Hello?")
    assert conversation.turns == []
    with pytest.raises(ConfigError, match="too long"):
        ask(Models({"policy": Failing(2)}), conversation, "Hello?")
    assert conversation.turns[0].answers[0].text == "xx" and not conversation.turns[0].answers[0].ended
    stream = Models({"policy": Scripted("policy")}).ask(conversation, "Again", "policy", SETTINGS)
    next(stream), next(stream)
    stream.close()
    assert not conversation.turns[1].answers[0].ended


def test_an_answer_that_was_cut_is_pressed_on_but_not_trained_on(presses):
    conversation = Conversation(presses)
    models = Models({"policy": Scripted("policy")})
    turn = list(models.ask(conversation, "Hello?", "policy", Settings(max_new_tokens=2)))[-1]
    assert turn.answers[0].text == "policy read" and not turn.answers[0].ended
    conversation.press_thumb(0, 0, "up")
    assert read(presses) == [] and presses.count() == {"up": 1}
