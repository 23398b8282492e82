"""Chatting and pressing in a terminal.

TEXT                     ask
/up  /down               a thumb on the last answer; /left-up, /right-down, ... on one of two
/withdraw                take the last thumb, edit or choice on the last answers back
/edit TEXT               what the last answer should have been
/left  /right  /tie      which of two answers is better
/again                   another answer to the same text
/new                     a new conversation
/system TEXT             the system turn of new conversations; empty for none
/temperature NUMBER      of the next answers
/help  /quit
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Iterator
from typing import TextIO

from kto_jax.command import visible
from kto_jax.config import ConfigError, TransientError
from kto_jax.thumbs.asking import Models
from kto_jax.thumbs.conversation import Conversation, Turn
from kto_jax.thumbs.models import Settings
from kto_jax.thumbs.presses import Presses

_SIDES = {"left": 0, "right": 1}
_LABELS = ("left", "right")


class Terminal:
    """A conversation in a terminal.

    Args:
      models: who may be asked.
      presses: where presses go.
      mode: who answers.
      settings: how answers are drawn.
      system: the system turn.
      write: where answers are written.
    """

    def __init__(
        self, models: Models, presses: Presses, *, mode: str, settings: Settings, system: str, write: TextIO
    ) -> None:
        self._models, self._presses, self._mode, self._settings = models, presses, mode, settings
        self._system, self._write = system, write
        self._conversation = Conversation(presses, system)

    def read(self, lines: Iterator[str]) -> None:
        """Answers lines until there are no more, or until /quit. An error is shown, and the next line is read."""
        for line in lines:
            try:
                if not self._take(line.strip()):
                    return
            except (ConfigError, TransientError) as error:
                self._say(f"({error})")
            except OSError as error:
                self._say(f"(not saved: {error}. Free some space or correct the permissions, and press again.)")

    def _take(self, line: str) -> bool:
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._stream(self._models.ask(self._conversation, line, self._mode, self._settings))
        elif word in ("/quit", "/exit", "/q"):
            return False
        elif word == "/help":
            self._say(str(__doc__).partition("\n\n")[2].rstrip())
        elif word == "/new":
            self._conversation = Conversation(self._presses, self._system)
            self._say("(a new conversation)")
        elif word == "/system":
            self._system = rest.strip()
            self._conversation = Conversation(self._presses, self._system)
            self._say("(a new conversation with this system turn)" if self._system else "(no system turn any more)")
        elif word == "/temperature":
            self._settings = dataclasses.replace(self._settings, temperature=_temperature(rest))
        else:
            self._press(word.removeprefix("/"), rest)
        return True

    def _press(self, press: str, rest: str) -> None:
        number = len(self._conversation.turns) - 1
        side, dash, thumb = press.partition("-")
        if press == "again" and number >= 0:
            self._stream(self._models.again(self._conversation, number, self._mode, self._settings))
            return
        if press in ("up", "down") or (dash and side in _SIDES and thumb in ("up", "down")):
            pressed = thumb or press
            self._conversation.press_thumb(number, _SIDES.get(side, 0), "up" if pressed == "up" else "down")
        elif press == "edit":
            self._conversation.edit(number, 0, rest)
        elif press in _SIDES:
            self._conversation.choose(number, _SIDES[press])
        elif press == "tie":
            self._conversation.choose(number, "tie")
        elif press == "withdraw":
            self._withdraw(number)
        else:
            raise ConfigError(f"/{press} is no command. /help lists those that there are. Write one of them.")
        self._say(f"(saved in {self._presses.path})")
        self._reveal(self._conversation.turns[number])

    def _withdraw(self, number: int) -> None:
        turn = self._conversation.turns[number] if number >= 0 else None
        if turn is not None and turn.choice is not None:
            self._conversation.choose(number, None)
            return
        for side, answer in enumerate(turn.answers if turn else []):
            if answer.edited is not None:
                return self._conversation.edit(number, side, answer.text)
            if answer.thumb is not None:
                return self._conversation.press_thumb(number, side, None)
        raise ConfigError("There is nothing to withdraw. A thumb, an edit or a choice on the last answers can be.")

    def _reveal(self, turn: Turn) -> None:
        if turn.choice is not None:
            names = (f"{label}: {answer.role}" for label, answer in zip(_LABELS, turn.answers, strict=True))
            self._say(f"({', '.join(names)})")

    def _stream(self, turns: Generator[Turn, None, None]) -> None:
        """Writes answers as they come; of two, the second when the first one is whole."""
        written, turn = ["", ""], None
        with contextlib.closing(turns):
            for turn in turns:
                if len(turn.answers) == 1:
                    self._write.write(visible(turn.answers[0].text[len(written[0]) :]))
                    self._write.flush()
                    written[0] = turn.answers[0].text
        if turn is None:
            return
        for label, answer in zip(_LABELS, turn.answers, strict=False):
            if len(turn.answers) == 2:
                self._say(f"{label}: {visible(answer.text)}")
            if not answer.ended:
                self._say(f" (cut after {answer.num_tokens} tokens)")
        if len(turn.answers) == 1:
            self._write.write("\n")

    def _say(self, text: str) -> None:
        self._write.write(f"{text}\n")
        self._write.flush()


def typed(prompt: str = "> ") -> Iterator[str]:
    """Lines from standard input, until its end."""
    while True:
        try:
            yield input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"/temperature {text} cannot be used. Allowed: 0 or a positive number. Write one.")
    return value
