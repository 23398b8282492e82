"""Fifty people at once, by the requests that their browsers send, and a server that is killed in the middle."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time

import pytest

from kto_jax.thumbs.presses import Presses
from tests import ROOT

pytestmark = pytest.mark.browser

NUM_PEOPLE, NUM_PRESSES = 50, 300


class Person:
    """A session of the page, as Gradio's client in a browser has it."""

    def __init__(self, client, config, number):
        self._client, self._events, self.number = client, config["dependencies"], number
        self._hash = f"person{number:03}"
        self._ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}

    async def call(self, element, event, data, event_data=None):
        """Sends an event, given by its name or number, and returns what the server answers once it is done."""
        import httpx

        body = {
            "data": data,
            "event_data": event_data,
            "session_hash": self._hash,
            "fn_index": self._find(element, event) if isinstance(event, str) else event,
        }
        joined = await self._client.post("/gradio_api/queue/join", json=body)
        joined.raise_for_status()
        answer = None
        try:
            async for message in self._messages():
                if message["msg"] == "process_completed" and message["event_id"] == joined.json()["event_id"]:
                    assert message["success"], message
                    answer = message["output"]["data"]
        except httpx.HTTPError:
            if answer is None:
                raise
        if answer is None:
            raise ConnectionError("the stream ended before the answer")
        return answer

    async def _messages(self):
        """What the server says until it ends the stream.

        A client that leaves earlier makes Gradio forget the session's events, and with them one that it sends next.
        """
        async with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._hash}) as lines:
            lines.raise_for_status()
            async for line in lines.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    async def ask(self, said):
        """Asks, and receives all of the answer."""
        await self.call("say", "submit", [said, None, "policy", 0.7, 32])
        asking = self._find("say", "submit")
        await self.call(None, next(each["id"] for each in self._events if each["trigger_after"] == asking), [None])

    def _find(self, element, event):
        return next(each["id"] for each in self._events if [self._ids.get(element), event] in each["targets"])

    async def live(self, acknowledged):
        """Asks and presses without end; tells each press once the page says that it is saved."""
        for turn in itertools.count():
            said = f"person {self.number} turn {turn}"
            await self.ask(said)
            for liked in (True, False):
                answer = await self.call("left", "like", [None], {"index": 2 * turn + 1, "value": [], "liked": liked})
                assert answer[3] == "saved"
                acknowledged(self.number, said, "up" if liked else "down")


async def live_until_killed(url, server):
    """Lets everybody press until there are enough presses of each, and kills the server; returns the presses."""
    import httpx

    presses, people, enough, killed = [], set(), asyncio.Event(), asyncio.Event()

    def acknowledged(number, said, press):
        presses.append((said, press))
        people.add(number)
        if len(presses) >= NUM_PRESSES and len(people) == NUM_PEOPLE:
            enough.set()

    async def live(person):
        try:
            await person.live(acknowledged)
        except (httpx.HTTPError, ConnectionError):
            if not killed.is_set():
                raise

    # Without a limit of time: a slow machine answers late, and the kill ends every connection.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        config = (await client.get("/config")).json()
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_PEOPLE):
                group.create_task(live(Person(client, config, number)))
            await enough.wait()
            killed.set()
            server.kill()
    return presses


def test_every_press_that_fifty_people_were_told_is_saved_is_in_the_file(tmp_path):
    command = [sys.executable, "-m", "tests.thumbs.scripted", str(tmp_path)]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True) as server:
        try:
            acknowledged = asyncio.run(live_until_killed(server.stdout.readline().strip(), server))
        finally:
            server.kill()
    seconds = time.monotonic() - started
    # The next press mends a line that the kill cut.
    presses = Presses(tmp_path / "presses.jsonl")
    presses.append({"press": "up", "answer": "a", "prompt": [{"role": "user", "content": "after"}], "completion": "A."})
    rows = [json.loads(line) for line in presses.path.read_text().splitlines()]
    written = [(row["prompt"][-1]["content"], row["press"]) for row in rows[:-1]]
    assert len(written) == len(set(written)) and set(acknowledged) <= set(written)
    # Beyond those, at most the press of each person that was on its way.
    assert len(written) - len(acknowledged) <= NUM_PEOPLE
    print(f"{len(acknowledged)} acknowledged, {len(written)} written, {presses.num_torn} torn, {seconds:.0f} s")
