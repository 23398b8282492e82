"""The chat page, in Gradio: what is shown, and which press calls what.

The state of a person is in the server, so that what the browser shows after every press is what is on disk.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before Gradio is imported: nothing leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from kto_jax.config import ConfigError, TransientError
from kto_jax.thumbs.asking import BOTH, Models
from kto_jax.thumbs.conversation import Answer, Conversation, Turn
from kto_jax.thumbs.models import Answering, Settings, whole_characters
from kto_jax.thumbs.presses import Presses
from kto_jax.thumbs.training import Training

CSS = """
footer {display: none !important}
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
:root {--block-info-text-color: var(--block-title-text-color); --input-placeholder-color: var(--block-title-text-color)}
.main.app {padding-inline: clamp(8px, 2.5vw, 32px) !important}
#chats .placeholder {padding: 16px}
#title h1 {margin-bottom: 0}
#status p {min-height: 1.5em}
.edit-textarea {min-width: min(420px, 60vw); min-height: 6em !important; field-sizing: content}
progress {width: 100%}
#choices {align-items: stretch}
@media (max-width: 640px) {
  #chats:has(#right) > .block {height: 38vh !important; flex-basis: 100%}
  #choices button {padding-inline: 4px; font-size: 14px}
}
"""
_ABOUT_MODES = "The policy is your model; the reference is what it is compared with."
_MODES = {"policy": "Policy", "reference": "Reference", "endpoint": "Endpoint", BOTH: "Side by side, blind"}
_EMPTY = "Say something below. Then press a thumb under the answer, or edit it: what you press can be trained on."
_THUMBS = {"up": "Like", "down": "Dislike", None: None}
_BROKEN = "the answer broke off, so presses on it are kept and not trained on"
_SHOWN_SECONDS = 0.05
"""Least time between two views of an answer that grows: a browser shows no more, and each is sent whole."""
_EVERY: dict[str, Any] = {"trigger_mode": "multiple"}
"""Otherwise Gradio drops what is pressed while the press before it is being saved, and what is sent while the answer
before it, which was stopped or left for a new conversation, is still being cancelled."""
_PRESS: dict[str, Any] = {"show_progress": "hidden", **_EVERY}
_UNCHANGED = (gr.skip(),) * 5
"""Both chats, the buttons of choice, the status and the text as they are."""
_PEOPLE = 256
"""Calls that run at once; nearly all of them wait for their turn on the device."""


class ChatPage:
    """The page.

    Args:
      models: who may be asked.
      presses: where presses go.
      training: the train button; None leaves it out.
      reload: opens the model that a training made; None without a train button.
      settings: how answers are drawn, unless a person changes it.
      system: the system turn, unless a person changes it.
    """

    def __init__(
        self,
        models: Models,
        presses: Presses,
        training: Training | None,
        reload: Callable[[Path], Answering] | None,
        *,
        settings: Settings,
        system: str,
    ) -> None:
        self._models, self._presses, self._training, self._reload = models, presses, training, reload
        self._settings, self._system = settings, system

    def build(self) -> gr.Blocks:
        """The page as Gradio's blocks."""
        modes = [(_MODES[mode], mode) for mode in self._models.modes]
        with gr.Blocks(analytics_enabled=False, title="kto_jax chat", fill_height=True) as page:
            person = gr.State(Conversation(self._presses, self._system))  # Each session gets a copy.
            title = gr.Markdown(elem_id="title")
            mode = gr.Radio(
                modes, value=modes[-1][1], label="Who answers", info=_ABOUT_MODES, visible=len(modes) > 1,
                elem_id="mode",
            )  # fmt: skip
            with gr.Row(elem_id="chats"):
                left, right = self._chat("left"), self._chat("right")
            with gr.Row(visible=False, elem_id="choices") as choices:
                better = [
                    gr.Button(label, elem_id=name, min_width=90)
                    for label, name in (
                        ("Left is better", "choose-left"),
                        ("Tie", "choose-tie"),
                        ("Right is better", "choose-right"),
                    )
                ]
            status = gr.Markdown(elem_id="status")
            text = gr.Textbox(
                placeholder="Say something",
                show_label=False,
                submit_btn="Send",
                autofocus=True,
                elem_id="say",
                max_lines=8,
            )
            new = gr.Button("New conversation", elem_id="new", size="sm")
            with gr.Accordion("Settings", open=False):
                temperature = gr.Slider(
                    0, 2, self._settings.temperature, step=0.05, label="Temperature",
                    info="0 always takes the most likely word; higher values vary more.",
                )  # fmt: skip
                usual = self._settings.max_new_tokens
                longest = gr.Slider(min(16, usual), max(2048, usual), usual, step=1, label="Longest answer, in tokens")
                system = gr.Textbox(
                    self._system, label="System turn of new conversations", lines=2, elem_id="system",
                    info="What the model is told before your first message.",
                )  # fmt: skip
            shown = [left, right, choices, status]
            drawn = [person, mode, temperature, longest]
            page.load(self._title, None, title)
            asking = [text.submit(self._ask, [text, *drawn], [*shown, text], **_EVERY)]
            for side, chat in enumerate((left, right)):
                chat.like(self._on_like(side), [person], shown, **_PRESS)
                asking.append(chat.edit(self._on_edit(side), drawn, [*shown, text], **_EVERY))
                asking.append(chat.retry(self._on_retry(), drawn, [*shown, text], **_EVERY))
            answering = [each.then(self._answer, [person], [*shown, text], **_EVERY) for each in asking]
            text.stop(self._stopped, [person], [*shown, text], cancels=answering)
            # An answer that is still being written must not come back into the new conversation.
            begins = [new.click, left.clear, right.clear]
            gr.on(begins, self._reset, [person, system], [person, *shown, text], cancels=[*asking, *answering])
            for choice, button in zip((0, "tie", 1), better, strict=True):
                button.click(self._on_choice(choice), [person], shown, **_PRESS)
            if self._training is not None:
                self._add_training(page, title)
        page.max_threads = _PEOPLE
        page.queue(default_concurrency_limit=_PEOPLE)
        return page

    def _chat(self, name: str) -> gr.Chatbot:
        return gr.Chatbot(
            label=name.capitalize(), show_label=False, height="55vh", min_width=300, elem_id=name, editable="all",
            visible=name == "left", buttons=["copy"], latex_delimiters=[], placeholder=_EMPTY,
        )  # fmt: skip

    def _add_training(self, page: gr.Blocks, title: gr.Markdown) -> None:
        with gr.Accordion("Train on what was pressed", open=False) as part:
            counts = gr.Markdown(elem_id="counts")
            train = gr.Button("Train", variant="primary", elem_id="train")
            progress = gr.HTML(elem_id="progress")
        part.expand(self._count, None, counts)
        page.load(self._count, None, counts)
        train.click(self._train, None, [progress, title, counts], concurrency_limit=None)

    # ------------------------------------------------------------------------------------------------------- one person

    def _reset(self, left: Conversation, system: str) -> tuple[Any, ...]:
        left.is_left = True
        left.stop()
        person = Conversation(self._presses, system)
        return person, *_view(person), gr.Textbox(submit_btn="Send", stop_btn=False)

    def _title(self) -> str:
        names = [f"{_MODES[role].lower()} `{model.name}`" for role, model in self._models.by_role.items()]
        return f"# Chat\n{' · '.join(names)} · presses go to `{self._presses.path}`"

    # Gradio finds the data of an event by the annotation of a plain function's argument.

    def _on_like(self, side: int) -> Callable[..., Any]:
        def like(person: Conversation, event: gr.LikeData) -> tuple[Any, ...]:
            return self._like(person, side, event.index, event.liked)

        return like

    def _on_edit(self, side: int) -> Callable[..., Any]:
        def edit(person: Conversation, mode: str, warmth: float, longest: float, event: gr.EditData) -> Any:
            return self._edit(person, side, event, mode, Settings(warmth, int(longest)))

        return edit

    def _on_retry(self) -> Callable[..., Any]:
        def retry(person: Conversation, mode: str, warmth: float, longest: float, event: gr.RetryData) -> Any:
            number, settings = _index(event.index) // 2, Settings(warmth, int(longest))
            return self._begin(person, lambda: self._models.again(person, number, mode, settings))

        return retry

    def _on_choice(self, choice: Any) -> Callable[..., Any]:
        return lambda person: self._choose(person, choice)

    def _like(self, person: Conversation, side: int, index: Any, liked: Any) -> tuple[Any, ...]:
        thumb: Any = {True: "up", False: "down"}.get(liked) if isinstance(liked, bool) else None
        number = _index(index) // 2
        save = lambda: person.press_thumb(number, _side(person, number, side), thumb)  # noqa: E731
        return self._press(person, save, "saved" if thumb else "withdrawn")

    def _choose(self, person: Conversation, choice: Any) -> tuple[Any, ...]:
        number = len(person.turns) - 1
        again = number >= 0 and person.turns[number].choice == choice
        save = lambda: person.choose(number, None if again else choice)  # noqa: E731
        return self._press(person, save, "withdrawn" if again else "saved")

    def _edit(
        self, person: Conversation, side: int, event: gr.EditData, mode: str, settings: Settings
    ) -> tuple[Any, ...]:
        """An edited answer is a press; an edited question is asked again."""
        number, is_answer = divmod(_index(event.index), 2)
        text = whole_characters(_text(event.value))
        if is_answer:
            save = lambda: person.edit(number, _side(person, number, side), text)  # noqa: E731
            return *self._press(person, save), gr.skip()
        if not text.strip():
            gr.Warning("The edited question is empty. It needs some text. Edit it again, or begin a new conversation.")
            return *_view(person, "not changed"), gr.skip()
        return self._begin(person, lambda: self._models.again(person, number, mode, settings, text.strip()))

    def _press(self, person: Conversation, save: Callable[[], None], note: str = "saved") -> tuple[Any, ...]:
        """Saves a press, and then shows the note; if that fails, says so and shows what is on disk."""
        try:
            save()
        except ConfigError as error:
            gr.Warning(html.escape(str(error)))
            note = "not saved"
        except OSError as error:
            gr.Warning(
                f"The press was not saved: {html.escape(str(error))}. Free some space or correct the permissions, and "
                "press again."
            )
            note = "not saved"
        return _view(person, note)

    def _ask(self, text: str, person: Conversation, mode: str, temperature: float, longest: float) -> tuple[Any, ...]:
        settings = Settings(temperature, int(longest))
        said = whole_characters(text.strip())
        if not said:
            return _UNCHANGED
        return self._begin(person, lambda: self._models.ask(person, said, mode, settings), said)

    def _begin(self, person: Conversation, begin: Callable[[], Iterator[Turn]], text: str = "") -> tuple[Any, ...]:
        """Shows that an answer is begun, which `_answer` then shows as it grows; a conversation has one at a time.

        These are two events because a browser that is slow takes several views of one event at once, each as the last
        of them: the text that the first view clears and its button would stay as they were.
        """
        if not person.expect(self._views(person, begin, text)):
            gr.Warning(
                "An answer is still being written. A conversation has one at a time. Wait for its end, or stop it."
            )
            return _UNCHANGED
        cleared = {"value": ""} if text else {}
        return *_view(person), gr.Textbox(**cleared, submit_btn=False, stop_btn="Stop")

    def _answer(self, person: Conversation) -> Iterator[tuple[Any, ...]]:
        """Shows the answers that were asked for as they grow, until the conversation is left."""
        yield _UNCHANGED  # Gradio empties what an event that yields nothing could have changed.
        for shown in person.expected():
            yield _UNCHANGED if person.is_left else shown

    def _views(self, person: Conversation, begin: Callable[[], Iterator[Turn]], text: str) -> Iterator[tuple[Any, ...]]:
        """What is shown as the answers grow; if they cannot be had, says why and gives the text back."""
        started, first, turn, left = time.perf_counter(), 0.0, None, ""
        shown = 0.0
        try:
            for turn in begin():
                now, is_first = time.perf_counter(), not first and any(answer.text for answer in turn.answers)
                first = now if is_first else first
                if is_first or now - shown >= _SHOWN_SECONDS:
                    shown = now
                    yield *_view(person, _figures(turn.answers, started, first)), gr.skip()
        except (ConfigError, TransientError) as error:
            gr.Warning(html.escape(str(error)))
            if turn is not None and turn in person.turns:
                yield *_view(person, _BROKEN), gr.Textbox(submit_btn="Send", stop_btn=False)
                return
            left = text
        if person.is_growing:  # This answer was stopped, and the next one is being written.
            yield _UNCHANGED
            return
        note = _figures(turn.answers, started, first, ended=True) if turn is not None and not left else ""
        # What was typed meanwhile stays.
        yield *_view(person, note), gr.Textbox(**({"value": left} if left else {}), submit_btn="Send", stop_btn=False)

    def _stopped(self, person: Conversation) -> tuple[Any, ...]:
        person.stop()
        return *_view(person, "stopped"), gr.Textbox(submit_btn="Send", stop_btn=False)

    # --------------------------------------------------------------------------------------------------------- training

    def _count(self) -> str:
        found = self._presses.count()
        if not found:
            return "Nothing was pressed so far."
        return "\n".join(f"- {count} × {name}" for name, count in found.items())

    def _train(self) -> Iterator[tuple[Any, ...]]:
        assert self._training is not None and self._reload is not None
        yield _bar("starting …", 0, 0), gr.skip(), self._count()
        try:
            for progress in self._training.run():
                yield _bar(progress.text, progress.step, progress.num_steps), gr.skip(), gr.skip()
                if progress.policy is not None:
                    yield _bar("reading the new policy …", 1, 1), gr.skip(), gr.skip()
                    self._models.by_role["policy"] = self._reload(progress.policy)
                    yield _bar(f"{progress.policy} answers now", 1, 1), self._title(), self._count()
        except (ConfigError, TransientError, OSError) as error:
            gr.Warning(html.escape(str(error)))
            yield f"<p>{html.escape(str(error))}</p>", gr.skip(), self._count()


def _view(person: Conversation, note: str = "") -> tuple[Any, ...]:
    """Both chats, the buttons of choice, and the line below."""
    turns = person.turns
    two = bool(turns) and len(turns[-1].answers) == 2
    chats = []
    for side in range(2):
        messages: list[Any] = []
        thumbs = []
        for number, turn in enumerate(turns):
            answer = turn.answers[_side(person, number, side)]
            messages.append({"role": "user", "content": turn.said})
            messages.append({"role": "assistant", "content": answer.shown})
            thumbs.append(_THUMBS[answer.thumb])
        chats.append(gr.Chatbot(value=messages, feedback_value=thumbs, visible=two or side == 0, show_label=two))
    return *chats, gr.Row(visible=two), _said(turns[-1] if two else None, note)


def _said(turn: Turn | None, note: str) -> str:
    """The line below the chats; the models of two answers are shown once the better one is chosen."""
    if turn is None or turn.choice is None:
        return note
    roles = " · ".join(f"{side}: {answer.role}" for side, answer in zip(("left", "right"), turn.answers, strict=True))
    chosen = {0: "left is better", 1: "right is better", "tie": "a tie"}[turn.choice]
    return f"{chosen} ({roles}) · {note}"


def _figures(answers: list[Answer], started: float, first: float, *, ended: bool = False) -> str:
    """How fast the answers come, and which were cut."""
    tokens, now = sum(answer.num_tokens for answer in answers), time.perf_counter()
    if not first:
        return "…"
    text = f"first token after {first - started:.2f} s"
    if tokens > 1 and now > first:
        text += f" · {tokens} tokens · {(tokens - len(answers)) / (now - first):.1f} tokens a second"
    elif ended and tokens == 1:
        text += " · 1 token"
    cut = [answer for answer in answers if not answer.ended]
    if ended and cut:
        text += f" · cut at {cut[0].settings.max_new_tokens} tokens, so presses on it are kept and not trained on"
    return text


def _side(person: Conversation, number: int, side: int) -> int:
    """Which answer of a turn a chat shows: its own of the last turn, and the one that was kept of the others."""
    if not 0 <= number < len(person.turns):
        return 0
    turn = person.turns[number]
    if number == len(person.turns) - 1:
        return side if side < len(turn.answers) else 0
    return turn.answers.index(turn.kept)


def _index(index: Any) -> int:
    return int(index[0] if isinstance(index, list | tuple) else index)


def _text(value: Any) -> str:
    """The text of an edited message, which Gradio gives as text or as parts."""
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    return str(value.get("text", "")) if isinstance(value, dict) else str(value)


def _bar(text: str, step: int, num_steps: int) -> str:
    value = f' value="{step}" max="{num_steps}"' if num_steps else ""
    return f"<progress{value}></progress><p>{html.escape(text)}</p>"
