"""The chat page in real browsers: what people press there is in the file, and in the manifest of a training."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from kto_jax.config import DataConfig
from kto_jax.data.rows.files import SourceFile, read_rows
from kto_jax.data.rows.records import Feedback, Preference, read_as
from kto_jax.thumbs.asking import Models
from kto_jax.thumbs.conversation import Answer, Conversation
from kto_jax.thumbs.models import Settings
from kto_jax.thumbs.presses import Presses
from tests import ROOT
from tests.thumbs import browsing
from tests.thumbs.scripted import Scripted

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not browsing.is_installed(), reason="apt-get install chromium chromium-driver"),
]


@pytest.fixture
def served(tmp_path):
    """The address of the page with scripted models, and its folder."""
    command = [sys.executable, "-m", "tests.thumbs.scripted", str(tmp_path)]
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip(), tmp_path
        server.send_signal(signal.SIGKILL)


def rows_of(folder):
    path = folder / "presses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(folder, **settings):
    path = folder / "presses.jsonl"
    found = []
    for record in read_as(read_rows(SourceFile(path, "p")), DataConfig(**settings)).records:
        if isinstance(record, Feedback):
            found.append((record.completion, record.desirable))
        elif isinstance(record, Preference):
            found.append((record.chosen.completion, record.rejected.completion))
    return found


def begin_an_answer(page):
    """Asks for an answer of the policy that waits half done until the file `open` is there."""
    page.click("#mode input[value=policy]")
    page.say("please wait")
    page.wait(lambda: page.answers() == ["policy"])


def test_the_line_below_says_how_long_an_answer_is():
    from kto_jax.thumbs import page

    def said(num_tokens, **more):
        answer = Answer("policy", "m", Settings(max_new_tokens=8), num_tokens=num_tokens, **more)
        return page._figures([answer], time.perf_counter() - 2, time.perf_counter() - 1, ended=True)

    assert said(1, ended=True) == "first token after 1.00 s · 1 token"
    assert re.fullmatch(r"first token after 1.00 s · 5 tokens · [34]\.\d tokens a second", said(5, ended=True))
    assert said(0, ended=True) == "first token after 1.00 s"  # an endpoint that does not count
    assert "cut at 8 tokens" in said(5)


def test_an_empty_message_changes_nothing(tmp_path):
    """Not even by an event that shows nothing, for which Gradio empties the chats."""
    from kto_jax.thumbs import page

    presses, settings = Presses(tmp_path / "presses.jsonl"), Settings(max_new_tokens=8)
    chat, person = page.ChatPage(Models({}), presses, None, None, settings=settings, system=""), Conversation(presses)
    assert chat._ask(" \n", person, "policy", 1.0, 8) == page._UNCHANGED
    assert list(chat._answer(person)) == [page._UNCHANGED]


def test_an_answer_that_was_stopped_says_nothing_while_the_next_one_is_written(tmp_path):
    from kto_jax.thumbs import page

    presses, settings = Presses(tmp_path / "presses.jsonl"), Settings(max_new_tokens=8)
    chat, person = page.ChatPage(Models({}), presses, None, None, settings=settings, system=""), Conversation(presses)
    models = Models({"policy": Scripted("policy")})
    ask = lambda said: chat._begin(person, lambda: models.ask(person, said, "policy", settings), said)  # noqa: E731
    ask("one")
    slow = chat._answer(person)
    for _ in range(3):
        next(slow)
    chat._stopped(person)
    ask("two")
    next_one = chat._answer(person)
    for _ in range(3):
        next(next_one)
    assert list(slow) == [page._UNCHANGED]
    assert list(next_one)[-1][-1].submit_btn == "Send"


def test_a_person_sends_watches_presses_edits_withdraws_and_compares(served):
    url, folder = served
    with browsing.browser(url) as page:
        # Streaming: the answer is half there while the model waits.
        begin_an_answer(page)
        assert not page.is_ready()
        (folder / "open").touch()
        page.wait_for_answer("policy read 1 messages: please wait")
        page.wait_for_status("tokens a second")

        page.click("#left button[title=Dislike]")
        page.wait(lambda: [row["press"] for row in rows_of(folder)] == ["down"])
        page.wait_for_status("saved")
        page.click("#left button[title=Disliked]")
        page.wait(lambda: [row["press"] for row in rows_of(folder)] == ["down", "withdraw"])
        page.click("#left button[title=Like]")
        page.wait(lambda: len(rows_of(folder)) == 3)
        page.click("#left button[title=Dislike]")
        page.wait(lambda: len(rows_of(folder)) == 4)
        assert read(folder) == [("policy read 1 messages: please wait", False)]

        page.click("#left .message-buttons-left button[title=Edit]")
        box = page.wait(lambda: page.find("#left .bot textarea"))[-1]
        box.clear()
        box.send_keys("I wait.")
        page.click("#left button[title=Submit]")
        page.wait(lambda: len(rows_of(folder)) == 5)
        page.wait_for_answer("I wait.")
        assert read(folder, format="pairs") == [("I wait.", "policy read 1 messages: please wait")]

        # Side by side: whose answer it is is not shown before the choice. A picture in an answer is not fetched.
        page.click("#mode input[value=both]")
        page.say("compare ![x](http://example.com/x.png)")
        page.wait(lambda: page.is_ready() and page.answers("right"))
        assert "policy" not in page.status() and "reference" not in page.status()
        page.click("#choose-right")
        page.wait(lambda: len(rows_of(folder)) == 6)
        page.wait_for_status("right is better (left: ")
        choice = rows_of(folder)[5]
        assert {choice["better"].split()[0], choice["worse"].split()[0]} == {"policy", "reference"}
        assert [message["content"] for message in choice["prompt"][:2]] == ["please wait", "I wait."]
        roles = [each["role"] for each in choice["by"]]
        assert roles == [choice["better"].split()[0], choice["worse"].split()[0]]
        assert page.elsewhere() == [] and any("/gradio_api/" in address for address, _ in page.requests())
    hosts = set((folder / "connected.txt").read_text().split())
    assert hosts <= {"127.0.0.1", "::1"}
    assert read(folder) == [
        ("policy read 1 messages: please wait", False), ("I wait.", True), (choice["better"], True),
        (choice["worse"], False),
    ]  # fmt: skip


def test_an_answer_that_is_being_written_takes_no_press_and_nothing_else_is_asked(served):
    url, folder = served
    with browsing.browser(url) as page:
        begin_an_answer(page)
        page.click("#left button[title=Like]")
        page.wait_for_status("not saved")
        page.find("#say textarea")[0].send_keys("and this\n")
        page.wait_for_warning("An answer is still being written")
        (folder / "open").touch()
        page.wait_for_answer("policy read 1 messages: please wait")
        assert len(page.answers()) == 1 and rows_of(folder) == []
        assert page.find("#say textarea")[0].get_property("value").strip() == "and this"


@pytest.mark.parametrize("is_slow", [False, True], ids=["cancelled", "cancelling never ends"])
@pytest.mark.parametrize("press", ["new", "stop"])
def test_an_answer_that_is_being_written_ends_with_its_conversation_or_by_stop(served, press, is_slow):
    """At once, and even if the browser's message that cancels the answer never arrives."""
    url, folder = served
    with browsing.browser(url) as page:
        if is_slow:
            page.hold("/cancel")
        begin_an_answer(page)
        if press == "new":
            page.click("#new")
            page.wait(lambda: page.is_ready() and not page.answers())
            page.watch("please wait")
        else:
            page.click("#say button")
            page.wait_for_status("stopped")
            page.watch("messages: please wait")
        before = len(page.answers())
        page.say("hello")
        page.wait_for_answer(f"policy read {2 * before + 1} messages: hello")
        (folder / "open").touch()
        page.wait((folder / "ended").exists)
        page.say("again")
        page.wait_for_answer(f"policy read {2 * before + 3} messages: again")
        assert not page.seen() and len(page.answers()) == before + 2 and rows_of(folder) == []


def test_a_browser_that_takes_several_views_at_once_shows_what_each_of_them_changed(served):
    url, _ = served
    with browsing.browser(url) as page:
        page.lag("first token")
        page.hold("/cancel")  # The answer before goes on, so that views can come before the page waits for them.
        begin_an_answer(page)
        page.click("#new")
        page.wait(lambda: page.is_ready() and not page.answers())
        before = page.script("return window.lagged")
        page.say("wait again")
        page.wait(lambda: page.answers() == ["policy"])
        assert page.script("return window.lagged") > before
        assert page.find("#say textarea")[0].get_property("value") == "" and not page.is_ready()
        page.click("#say button")
        page.wait_for_status("stopped")
        page.wait(page.is_ready)


def test_two_people_at_once_see_only_their_own(served):
    url, folder = served
    with browsing.browser(url) as one, browsing.browser(url) as two:
        for page in (one, two):
            page.click("#mode input[value=policy]")
        one.say("wait for me")
        one.wait(lambda: one.answers() == ["policy"])
        two.say("quick")
        two.wait_for_answer("policy read 1 messages: quick")
        assert not one.is_ready()
        two.click("#left button[title=Like]")
        two.wait(lambda: len(rows_of(folder)) == 1)
        (folder / "open").touch()
        one.wait_for_answer("policy read 1 messages: wait for me")
        one.click("#left button[title=Dislike]")
        one.wait(lambda: len(rows_of(folder)) == 2)
        assert len(one.answers()) == len(two.answers()) == 1
    rows = rows_of(folder)
    assert len({row["conversation"] for row in rows}) == 2
    assert read(folder) == [
        ("policy read 1 messages: quick", True),
        ("policy read 1 messages: wait for me", False),
    ]
    shown = subprocess.run(
        [sys.executable, "-m", "kto_jax.inspect", "--config=configs/tiny.py", "--json", "--config.data.holdout=0",
         f"--config.data.train={folder}/presses.jsonl"],
        cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(folder)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(shown.stdout)
    assert found["accepted"] == 2 and sorted(each["label"] for each in found["examples"]) == [False, True]
