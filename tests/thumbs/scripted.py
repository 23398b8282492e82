"""A model that answers by a script, and the chat page with it: `python -m tests.thumbs.scripted FOLDER` serves it.

Standard output has the address, and the path of a file to which every address that the server connects to is written.
"""

import sys
import threading

from kto_jax.thumbs.models import Piece


class Scripted:
    """Says its name, the number of messages and what was said last, word by word; waits after the first if told to.

    `ended` is called with what was said last, at the end of each answer, also of one that was stopped.
    """

    def __init__(self, name, gate=None, ended=lambda last: None):
        self.name, self.gate, self.ended = name, gate, ended

    def stream(self, messages, settings, seed):
        last = messages[-1]["content"]
        words = f"{self.name} read {len(messages)} messages: {last}".split()
        limit = settings.max_new_tokens
        try:
            for number in range(1, min(len(words), limit) + 1):
                if self.gate is not None and number == 2:
                    self.gate(last)
                yield Piece(" ".join(words[:number]), number, number == len(words))
        finally:
            self.ended(last)


def wait_for_file(folder):
    """A gate for text with the word "wait", opened by a file in the folder: a test sees the answer half done."""
    changed = threading.Event()

    def gate(text):
        while "wait" in text.split() and not (folder / "open").exists():
            changed.wait(0.02)

    return gate


def serve_scripted(folder):
    """Serves the page with two scripted models, until the process is killed."""
    connected = (folder / "connected.txt").open("a", buffering=1)

    def note(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            connected.write(f"{arguments[1][0]}\n")

    sys.addaudithook(note)
    from kto_jax.thumbs.asking import Models
    from kto_jax.thumbs.models import Settings
    from kto_jax.thumbs.page import ChatPage
    from kto_jax.thumbs.presses import Presses
    from kto_jax.thumbs.serve import listen, serve

    gate = wait_for_file(folder)

    def ended(last):
        if "wait" in last.split():
            (folder / "ended").touch()

    models = Models({name: Scripted(name, gate, ended) for name in ("policy", "reference")})
    listening = listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    page = ChatPage(
        models, Presses(folder / "presses.jsonl"), None, None, settings=Settings(max_new_tokens=32), system=""
    )
    serve(page.build(), listening, "127.0.0.1", "")


if __name__ == "__main__":
    from pathlib import Path

    serve_scripted(Path(sys.argv[1]))
