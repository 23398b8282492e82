"""Writes docs/inspect.md, what `inspect` prints of ten files: `python -m tests.golden.inspect_page`.

A change in what is read, or in how it is shown, then shows as a difference in the page.
"""

import contextlib
import dataclasses
import io
import json
import runpy
import tempfile
from pathlib import Path
from unittest import mock

from rich.console import Console

from kto_jax.config import resolve
from kto_jax.data.index import builder
from kto_jax.data.index.index import build_index
from kto_jax.data.tokens.prepare import _prepare
from kto_jax.inspect import show
from tests import ROOT, TINY_MODEL
from tests.data.conftest import InProcessWorkers

PAGE = ROOT / "docs" / "inspect.md"
_WIDTH = 108
START = """\
# What inspect shows

`python -m kto_jax.inspect` on ten small files, each of a kind that people have. The row at the end of each is shown as
it is trained on: the completion, which counts in the loss, is between ⟦ and ⟧; the prompt is before it.
[Your data](data.md) explains the layouts.

`python -m tests.golden.inspect_page` writes this page up to the warnings, and a test keeps it true.
"""
_BY_HAND = "\n## Warnings\n"
"""Where the part of the page begins that is written by hand."""


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def webui(rating, **snapshot):
    messages = {
        "q1": {"id": "q1", "parentId": None, "role": "user", "content": "Which knife for bread?"},
        "a1": {"id": "a1", "parentId": "q1", "role": "assistant", "content": "A serrated one."},
        "a2": {"id": "a2", "parentId": "q1", "role": "assistant", "content": "Any knife."},
    }
    chat = {"chat": {"history": {"messages": messages}}}
    return {
        "type": "rating",
        "data": {"rating": rating},
        "meta": {"message_id": "a1"},
        "snapshot": {"chat": chat},
        **snapshot,
    }


THUMBS = [
    {"prompt": "A synonym for quick?", "completion": "Swift.", "label": True},
    {"prompt": "A synonym for quick?", "completion": "I like words.", "label": False},
    {"prompt": "Two herbs?", "completion": "Thyme and sage.", "label": True},
    {"prompt": "Two herbs?", "completion": "Dill.", "label": None},
    {"prompt": "A third?", "completion": "", "label": False},
]
SHEET = """\
Question;Reply;Thumb
Where is my parcel?;"With the courier; it comes today.";up
Where is my parcel?;Somewhere.;down

Can I pay later?;No.;
"""
LOG = {
    "messages": [
        turn("system", "Answer briefly."),
        *(turn("user", "Hello?"), turn("assistant", "Hi.", feedback=True)),
        *(turn("user", "A lake?"), turn("assistant", "The sea.", feedback=False)),
    ]
}
SHARED = [
    {"conversations": [{"from": "human", "value": "Rain in Dutch?"}, {"from": "gpt", "value": word}], "kto_tag": good}
    for word, good in (("Regen.", True), ("Snow.", False))
]
LIBRE = {
    "conversationId": "c1",
    "messages": [
        {"messageId": "m1", "parentMessageId": None, "isCreatedByUser": True, "text": "A hill?"},
        {"messageId": "m2", "parentMessageId": "m1", "isCreatedByUser": False, "text": "Box Hill."},
        {"messageId": "m3", "parentMessageId": "m2", "isCreatedByUser": True, "text": "Higher?"},
        {
            **{"messageId": "m4", "parentMessageId": "m3", "isCreatedByUser": False, "text": ""},
            "content": [{"type": "text", "text": "Leith Hill."}],
            "feedback": {"rating": "thumbsUp"},
        },
    ],
}
WORKSPACE = """\
id,username,workspace,prompt,response,sent_at,rating
1,ada,help,"How do I reset it?",Hold the button.,2026-01-02,GOOD
2,bob,help,"How do I reset it?",Buy a new one.,2026-01-02,BAD
3,bob,help,"And then?",Wait.,2026-01-03,--
"""
TRACES = [
    {
        "id": f"t{number}",
        "projectId": "p",
        "input": {"messages": [turn("user", "Sum of 2 and 3?")]},
        "output": turn("assistant", answer),
        "scores": scores,
    }
    for number, (answer, scores) in enumerate(
        [("5", [{"name": "thumb", "value": 1}]), ("6", [{"name": "thumb", "value": 0}]), ("7", [])]
    )
]
HH = "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: How do I publish?\n\nAssistant:"
TUNING = {
    "messages": [
        *(turn("user", "One fish?"), turn("assistant", "Trout.")),
        *(turn("user", "Two more?"), turn("assistant", "Cod and carp.")),
    ]
}
FILES = [
    ("Thumbs in your own columns", "thumbs.jsonl", lines(*THUMBS), {"max_rejected": 0.5}),
    (
        *("A sheet that a spreadsheet saved", "sheet.csv", SHEET),
        {
            **{"prompt_field": "Question", "completion_field": "Reply", "label_field": "Thumb"},
            "label_map": {"up": True, "down": False},
        },
    ),
    ("A chat log with feedback on its messages", "log.jsonl", lines(LOG), {}),
    ("ShareGPT with kto_tag", "sharegpt.json", json.dumps(SHARED), {}),
    ("Feedback exported by Open WebUI", "feedbacks.json", json.dumps([webui(1), webui(-1), webui(None)], indent=1), {}),
    ("A conversation exported by LibreChat", "conversation.json", json.dumps(LIBRE, indent=1), {}),
    ("Chats exported by AnythingLLM", "chats.csv", WORKSPACE, {}),
    ("Traces of Langfuse with scores", "traces.jsonl", lines(*TRACES), {}),
    (
        *("Preferences between transcripts, as HH-RLHF has them", "pairs.jsonl"),
        lines({"chosen": f"{HH} Write.", "rejected": f"{HH} Wait."}),
        {"format": "pairs"},
    ),
    ("Conversations for supervised fine-tuning", "tuning.jsonl", lines(TUNING), {"format": "demonstrations"}),
]
"""Title, name, content and settings of each file."""


def section(title, name, content, settings, config, tokenizer, folder):
    """One file of the page: its beginning, the command, and the whole output."""
    (folder / name).write_text(content, encoding="utf-8")
    data = dataclasses.replace(config.data, train=name, holdout=0.0, **settings)
    notes, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(notes), contextlib.chdir(folder):
        index = build_index(data, tokenizer, vocab_size=512, directory=folder / "indices")
    console = Console(file=shown, width=_WIDTH, highlight=False, color_system=None)
    show(index, tokenizer, dataclasses.replace(config, data=data), 1, console)
    output = notes.getvalue() + shown.getvalue().replace(f"index {index.directory}\n", "")
    output = "\n".join(line.rstrip() for line in output.splitlines())
    flags = "".join(
        f" \\\n    --config.data.{key}={_quoted(value)}" for key, value in {"train": name, **settings}.items()
    )
    command = f"python -m kto_jax.inspect --config=configs/tiny.py --rows=1{flags}"
    kind = name.rpartition(".")[2].replace("jsonl", "json")
    return f'\n## {title}\n\n```{kind} title="{name}"\n{content.strip()}\n```\n\n```text\n$ {command}\n{output}\n```\n'


def _quoted(value):
    return f'"{value}"' if isinstance(value, dict) else value


def by_hand():
    """What the page says of warnings."""
    return _BY_HAND + PAGE.read_text(encoding="utf-8").partition(_BY_HAND)[2]


def page():
    """The whole page."""
    config = resolve(runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]())
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(builder, "Workers", InProcessWorkers):
        folder = Path(scratch)
        tokenizer = _prepare(TINY_MODEL, folder / "tokenizer", "auto")
        return START + "".join(section(*file, config, tokenizer, folder) for file in FILES) + by_hand()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
