"""Times a newcomer's way: the quickstart, its evaluation, and a chat with its policy on the page, in Chromium.

    python -m benchmarks.quickstart_path                 # everything: about 15 minutes on two free cores
    python -m benchmarks.quickstart_path --folder=DIR    # keeps the run; one that is there is not trained again

Needs `pip install ".[reports,judges,chat,gguf]" selenium` and Debian's chromium and chromium-driver. Prints the seconds
of each command, and for each message what the page says about its speed, with the load average beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.thumbs.browsing import browser

ROOT = Path(__file__).parent.parent
MESSAGES = (
    "Write a one-sentence review of the movie Heat.",
    "And of the movie Titanic?",
    "Which of the two is longer?",
    "Name three films about the sea.",
    "Write a one-sentence review of the first of them.",
)
_FIGURES = re.compile(r"first token after ([\d.]+) s · (\d+) tokens?(?: · ([\d.]+) tokens a second)?")


class Speed(NamedTuple):
    """What the page says about an answer.

    Attributes:
      first: seconds until its first token.
      tokens: how many it has; of both answers side by side.
      rate: tokens a second after the first; 0 if there is only one.
      load: the machine's load average of the last minute.
    """

    first: float
    tokens: int
    rate: float
    load: float


def run(name: str, *flags: str) -> float:
    """Runs a command to its end, with a note of its time; returns the seconds."""
    command = [sys.executable, "-m", f"kto_jax.{name}", *flags]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.monotonic() - began
    print(f"{name}: {seconds:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    return seconds


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, float]]:
    """The chat page with the policy of a run; gives its address, and the seconds until that was printed."""
    flags = [f"--model={folder / 'quickstart'}", f"--workdir={folder / 'chat'}", "--port=0"]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "kto_jax.chat", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        said: list[str] = []
        for line in server.stderr:
            said.append(line)
            if line.startswith("http://"):
                break
        address = said[-1].strip() if said else ""
        try:
            if not address.startswith("http://"):
                raise RuntimeError(f"the page ended with exit code {server.wait()}: {''.join(said)}")
            yield address, time.monotonic() - began
        finally:
            server.terminate()


def ask(url: str) -> dict[str, list[Speed]]:
    """Asks every message of the policy, and the first one of both side by side; by who answers."""
    found: dict[str, list[Speed]] = {}
    with browser(url) as page:
        for mode, messages in (("policy", MESSAGES), ("both", MESSAGES[:1])):
            page.click(f"#mode input[value={mode}]")
            for number, message in enumerate(messages):
                before = len(page.answers())
                page.say(message)
                page.wait(lambda before=before: page.is_ready() and len(page.answers()) > before, "no answer")
                said = page.wait(lambda: _FIGURES.search(page.status()), "no figures")
                speed = Speed(float(said[1]), int(said[2]), float(said[3] or 0), os.getloadavg()[0])
                found.setdefault(mode, []).append(speed)
                print(f"{mode}, message {number + 1}: {speed}", flush=True)
    return found


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="keeps the run, the evaluation and the figures (path.json)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kto_jax-path-") as scratch:
        folder = Path(options.folder or scratch).resolve()
        made = folder / "quickstart"
        seconds = {
            "train": run("train", "--config=configs/quickstart.py", f"--workdir={made}"),
            "evaluate": run("evaluate", f"--run={made}", "--judge=feedback"),
        }
        with served(folder) as (url, waited):
            print(f"chat: the page was there after {waited:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
            seconds["chat until the page"] = waited
            speeds = {mode: [speed._asdict() for speed in found] for mode, found in ask(url).items()}
        (folder / "path.json").write_text(json.dumps({"seconds": seconds, "speeds": speeds}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
