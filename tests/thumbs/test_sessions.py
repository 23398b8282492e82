"""Fifty people at once, by the requests that their browsers send, and a server that is killed in the middle."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from kto_jax.thumbs.presses import Presses
from tests import ROOT

pytest.importorskip("gradio", reason='needs pip install ".[chat]"')

NUM_PEOPLE, NUM_PRESSES = 50, 300


class Person:
    """A session of the page, as Gradio's client in a browser has it."""

    def __init__(self, client, config, number):
        self._client, self._config, self.number = client, config, number
        self._hash = f"person{number:03}"
        self._ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}

    async def call(self, element, event, data, event_data=None):
        """Sends an event, and returns what the server answers once it is done."""
        body = {
            "data": data,
            "event_data": event_data,
            "session_hash": self._hash,
            "fn_index": self._find(element, event),
        }
        joined = await self._client.post("/gradio_api/queue/join", json=body)
        joined.raise_for_status()
        async with self._client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._hash}) as answers:
            async for line in answers.aiter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == joined.json()["event_id"]:
                    assert message["success"], message
                    return message["output"]["data"]
        raise ConnectionError("the stream ended before the answer")

    def _find(self, element, event):
        found = [
            each["id"] for each in self._config["dependencies"] if [self._ids.get(element), event] in each["targets"]
        ]
        return found[0]

    async def live(self, acknowledged):
        """Asks and presses until the server is gone; notes each press once the page says that it is saved."""
        import httpx

        try:
            for turn in range(1000):
                said = f"person {self.number} turn {turn}"
                await self.call("say", "submit", [said, None, "policy", 0.7, 32])
                for liked in (True, False):
                    answer = await self.call(
                        "left", "like", [None], {"index": 2 * turn + 1, "value": [], "liked": liked}
                    )
                    assert answer[3] == "saved"
                    acknowledged.append((said, "up" if liked else "down"))
        except (httpx.HTTPError, ConnectionError):
            return


async def live_until_killed(url, server):
    import httpx

    acknowledged = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as client:
        config = (await client.get("/config")).json()
        people = [asyncio.create_task(Person(client, config, n).live(acknowledged)) for n in range(NUM_PEOPLE)]
        while len(acknowledged) < NUM_PRESSES and not all(task.done() for task in people):
            await asyncio.sleep(0.01)
        server.send_signal(signal.SIGKILL)
        await asyncio.gather(*people)
    return acknowledged


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_press_that_fifty_people_were_told_is_saved_is_in_the_file(tmp_path):
    command = [sys.executable, "-m", "tests.thumbs.scripted", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        acknowledged = asyncio.run(live_until_killed(url, server))
    assert len(acknowledged) >= NUM_PRESSES and len({said.split()[1] for said, _ in acknowledged}) == NUM_PEOPLE
    # The next press mends a line that the kill cut.
    presses = Presses(tmp_path / "presses.jsonl")
    presses.append({"press": "up", "answer": "a", "prompt": [{"role": "user", "content": "after"}], "completion": "A."})
    rows = [json.loads(line) for line in presses.path.read_text().splitlines()]
    written = [(row["prompt"][-1]["content"], row["press"]) for row in rows[:-1]]
    assert len(written) == len(set(written)) and set(acknowledged) <= set(written)
    # Beyond those, at most the press of each person that was on its way.
    assert len(written) - len(acknowledged) <= NUM_PEOPLE
    print(f"{len(acknowledged)} acknowledged, {len(written)} written, {presses.num_torn} torn")
