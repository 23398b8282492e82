"""A conversation of one person with one or two models, and the presses that are made in it.

A turn has one answer, or two side by side whose models are not shown. The conversation goes on with the answer that was
chosen, else with the first, so both answers of every turn have the same prompt. An edited answer goes on as edited.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from kto_jax.config import ConfigError
from kto_jax.thumbs.models import Settings
from kto_jax.thumbs.presses import Presses

Thumb = Literal["up", "down"]


@dataclasses.dataclass
class Answer:
    """An answer of a model.

    Attributes:
      role: "policy", "reference" or "endpoint".
      model: the model's name.
      settings: how the answer was drawn.
      id: what presses call it.
      text: what the model wrote.
      num_tokens: how long that is; 0 if that is not known.
      ended: whether the model ended it; False if it was cut.
      is_growing: whether it is still being written.
      thumb: the thumb that counts.
      edited: the text that replaces it, if a person wrote one.
    """

    role: str
    model: str
    settings: Settings
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    text: str = ""
    num_tokens: int = 0
    ended: bool = False
    is_growing: bool = False
    thumb: Thumb | None = None
    edited: str | None = None

    @property
    def shown(self) -> str:
        """The text as the conversation has it."""
        return self.text if self.edited is None else self.edited


@dataclasses.dataclass
class Turn:
    """What a person said, and what was answered.

    Attributes:
      said: the person's text.
      prompt: the messages that the answers answer, as they were then; the last one is what was said.
      answers: one, or two in the order in which they are shown.
      id: what choices call the two.
      choice: the number of the better answer, "tie", or None.
    """

    said: str
    prompt: list[dict[str, str]]
    answers: list[Answer]
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    choice: int | Literal["tie"] | None = None

    @property
    def kept(self) -> Answer:
        """The answer that the conversation goes on with."""
        return self.answers[self.choice if isinstance(self.choice, int) else 0]


class Conversation:
    """The turns of a conversation; safe to use from several threads.

    Every press is on disk before it counts here.

    Args:
      presses: where presses go.
      system: the system turn; "" for none.

    Attributes:
      is_left: whether a new conversation has taken its place.
    """

    def __init__(self, presses: Presses, system: str = "") -> None:
        self.id = secrets.token_hex(8)
        self.system = system.strip()
        self.turns: list[Turn] = []
        self.is_left = False
        self._awaited: Iterator[Any] | None = None
        self._presses = presses
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """A new conversation that begins as this one did: Gradio copies the state of a page for each person."""
        return Conversation(self._presses, self.system)

    def begin(self, said: str, answers: list[Answer]) -> Turn:
        """Adds a turn whose answers are still empty."""
        with self._lock:
            prompt = [{"role": "system", "content": self.system}] if self.system else []
            for turn in self.turns:
                prompt.append({"role": "user", "content": turn.said})
                prompt.append({"role": "assistant", "content": turn.kept.shown})
            self.turns.append(Turn(said, [*prompt, {"role": "user", "content": said}], answers))
            return self.turns[-1]

    def expect(self, views: Iterator[Any]) -> bool:
        """Keeps what is to be shown of an answer that was asked for; False if the answer before it has not ended."""
        with self._lock:
            if self.is_growing:
                return False
            self._awaited = views
            return True

    def expected(self) -> Iterator[Any]:
        """What `expect` kept, once; nothing if that was stopped. The first view begins the answer."""
        with self._lock:
            views, self._awaited = self._awaited or iter(()), None
            first = list(itertools.islice(views, 1))
        yield from first
        yield from views

    @property
    def is_growing(self) -> bool:
        """Whether an answer is still being written, or was asked for."""
        if self._awaited is not None:
            return True
        return bool(self.turns) and any(answer.is_growing for answer in self.turns[-1].answers)

    def stop(self) -> None:
        """Ends the answers that are being written; one that was asked for is not begun."""
        with self._lock:
            self._awaited = None
            if self.turns:
                self.end(self.turns[-1])

    def end(self, turn: Turn) -> None:
        """Ends the answers of a turn where they are; a turn without an answer is taken back."""
        with self._lock:
            for answer in turn.answers:
                answer.is_growing = False
            if not all(answer.text for answer in turn.answers):
                self.turns = [each for each in self.turns if each is not turn]

    def cut(self, number: int) -> None:
        """Drops a turn and those behind it. What was pressed on them stays pressed."""
        with self._lock:
            del self.turns[number:]

    def press_thumb(self, number: int, side: int, thumb: Thumb | None) -> None:
        """Sets the thumb of an answer; None withdraws it.

        Raises:
          ConfigError: the answer is edited, or there is none yet.
          OSError: the press could not be saved; nothing has changed.
        """
        with self._lock:
            answer = self._answer(number, side)
            if thumb is None:
                self._withdraw("thumb", answer.thumb is not None, answer=answer.id)
            elif answer.edited is not None:
                raise ConfigError(
                    "An edited answer counts as good and its original as bad. Edit it back to what the model wrote to "
                    "press a thumb on that."
                )
            else:
                self._save(thumb, number, answer, completion=answer.text)
            answer.thumb = thumb

    def edit(self, number: int, side: int, text: str) -> None:
        """Replaces the text of an answer; the model's own text withdraws the edit.

        Raises:
          ConfigError: the text is empty, or there is no answer yet.
          OSError: the press could not be saved; nothing has changed.
        """
        with self._lock:
            answer = self._answer(number, side)
            if not text.strip():
                raise ConfigError("The edited answer is empty. It needs some text. Press thumbs down for a bad answer.")
            if text.strip() == answer.text.strip():
                self._withdraw("edit", answer.edited is not None, answer=answer.id)
                answer.edited = None
            else:
                self._save("edit", number, answer, completion=text, original=answer.text)
                answer.edited = text

    def choose(self, number: int, choice: int | Literal["tie"] | None) -> None:
        """Says which of two answers is better; None withdraws that.

        Raises:
          ConfigError: the turn has one answer, or the two are not there yet, or they are the same.
          OSError: the press could not be saved; nothing has changed.
        """
        with self._lock:
            turn = self.turn(number)
            if len(turn.answers) != 2:
                raise ConfigError("This turn has one answer. A choice needs two. Choose after a turn side by side.")
            answers = [self._answer(number, side) for side in (0, 1)]
            if isinstance(choice, int) and answers[0].text.strip() == answers[1].text.strip():
                raise ConfigError("Both answers are the same. Neither can be better. Press thumbs on them, or Tie.")
            if choice is None:
                self._withdraw("choice", turn.choice is not None, comparison=turn.id)
            elif choice == "tie":
                self._save_choice("tie", number, answers)
            else:
                self._save_choice("choice", number, [answers[choice], answers[1 - choice]])
            turn.choice = choice

    def turn(self, number: int) -> Turn:
        """A turn by its number.

        Raises:
          ConfigError: there is none.
        """
        if not 0 <= number < len(self.turns):
            raise ConfigError(
                "There is no such answer here: nothing was asked yet, or the program was started again since. A press "
                "belongs to an answer of the running program. Ask something."
            )
        return self.turns[number]

    def _answer(self, number: int, side: int) -> Answer:
        answer = self.turn(number).answers[side if len(self.turn(number).answers) > side else 0]
        if not answer.text.strip():
            raise ConfigError("There is no answer to press on. A press needs one. Wait for it, or ask again.")
        if answer.is_growing:
            raise ConfigError(
                "The answer is still being written. A press belongs to all of its text. Wait for its end, or stop it."
            )
        return answer

    def _withdraw(self, kind: str, there: bool, **about: str) -> None:
        if there:
            self._presses.append({"press": "withdraw", "of": kind, **about, "conversation": self.id})

    def _save(self, press: str, number: int, answer: Answer, **texts: str) -> None:
        about = {"answer": answer.id, "prompt": self.turns[number].prompt, **texts, "ended": answer.ended}
        self._presses.append({"press": press, **about, "by": _described(answer), "conversation": self.id})

    def _save_choice(self, press: str, number: int, answers: list[Answer]) -> None:
        better, worse = answers
        texts = (
            {"better": better.text, "worse": worse.text} if press == "choice" else {"tied": [better.text, worse.text]}
        )
        row: Mapping[str, Any] = {
            "comparison": self.turns[number].id,
            "answers": [answer.id for answer in answers],
            "prompt": self.turns[number].prompt,
            **texts,
            "ended": better.ended and worse.ended,
            "by": [_described(answer) for answer in answers],
        }
        self._presses.append({"press": press, **row, "conversation": self.id})


def _described(answer: Answer) -> dict[str, Any]:
    return {"role": answer.role, "model": answer.model, **dataclasses.asdict(answer.settings)}
