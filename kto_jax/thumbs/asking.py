"""Asking models in a conversation: the policy, the reference, or both side by side in a hidden order."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Generator

from kto_jax.thumbs.conversation import Answer, Conversation, Turn
from kto_jax.thumbs.models import Answering, Settings

BOTH = "both"


@dataclasses.dataclass
class Models:
    """The models that may be asked.

    Attributes:
      by_role: each model by what it is: "policy", "reference" or "endpoint".
    """

    by_role: dict[str, Answering]

    @property
    def modes(self) -> list[str]:
        """Who may answer: each role, and "both" if there are two."""
        roles = list(self.by_role)
        return [*roles, BOTH] if len(roles) == 2 else roles

    def ask(self, conversation: Conversation, said: str, mode: str, settings: Settings) -> Generator[Turn, None, None]:
        """Adds a turn to a conversation and streams its answers into it.

        Args:
          conversation: that of one person.
          said: what the person says.
          mode: one of `modes`.
          settings: how answers are drawn.

        Yields:
          The turn, after each piece of an answer.

        Raises:
          ConfigError: the conversation cannot be answered. A turn without an answer is taken back.
          TransientError: a model cannot be reached.
        """
        roles = list(self.by_role) if mode == BOTH else [mode]
        if len(roles) == 2 and secrets.randbits(1):
            roles.reverse()
        models = [self.by_role[role] for role in roles]
        answers = [
            Answer(role, model.name, settings, is_growing=True) for role, model in zip(roles, models, strict=True)
        ]
        turn = conversation.begin(said, answers)
        streams = [model.stream(turn.prompt, settings, secrets.randbits(31)) for model in models]
        running = list(zip(streams, answers, strict=True))
        try:
            yield turn
            while running:
                for stream, answer in list(running):
                    piece = next(stream, None)
                    if not answer.is_growing:  # Somebody ended it meanwhile.
                        return
                    if piece is None:
                        answer.is_growing = False
                        running.remove((stream, answer))
                        continue
                    answer.text, answer.num_tokens, answer.ended = piece.text, piece.num_tokens, piece.ended
                    yield turn
        finally:
            conversation.end(turn)

    def again(
        self, conversation: Conversation, number: int, mode: str, settings: Settings, said: str = ""
    ) -> Generator[Turn, None, None]:
        """Asks a turn again, with another text if one is given; it and those behind it are dropped.

        Presses on the dropped answers stay.
        """
        turn = conversation.turn(number)
        conversation.cut(number)
        yield from self.ask(conversation, said or turn.said, mode, settings)
