"""A run's folder: a slow shared file system, and the configuration of every part of a run."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from kto_jax.config import Config, TransientError
from kto_jax.data.tokens.tokenizer import TokenizerInfo
from kto_jax.storage.run_place import RunPlace
from kto_jax.training import run_folder
from kto_jax.training.run_folder import record_part

INFO = TokenizerInfo(
    Path("unread"), vocab_size=3, bos_id=None, eos_id=2, stop_ids=(2,), sha256="", has_chat_template=False
)
FIRST, SECOND = (dataclasses.replace(Config(), max_bad_steps=number) for number in (3, 4))


def history(folder):
    """First step and max_bad_steps of every part."""
    lines = (folder / "config_history.jsonl").read_text().splitlines()
    return [(part["first_step"], part["config"]["max_bad_steps"]) for part in map(json.loads, lines)]


def test_every_part_of_a_run_keeps_its_configuration_and_its_first_step(tmp_path):
    record_part(tmp_path, 0, FIRST)
    record_part(tmp_path, 6, SECOND)
    assert history(tmp_path) == [(0, 3), (6, 4)]


def test_a_part_whose_rows_are_dropped_is_dropped_from_the_history(tmp_path):
    for step, config in ((0, FIRST), (6, SECOND), (9, SECOND), (6, FIRST)):
        record_part(tmp_path, step, config)
    assert history(tmp_path) == [(0, 3), (6, 3)]


def test_a_run_that_predates_the_history_keeps_the_configuration_of_its_first_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_bad_steps": 7}))
    run_folder._begin_history(tmp_path)
    record_part(tmp_path, 5, SECOND)
    assert history(tmp_path) == [(0, 7), (5, 4)]
    run_folder._begin_history(tmp_path)
    assert history(tmp_path) == [(0, 7), (5, 4)]


def test_processes_wait_for_a_folder_that_a_shared_file_system_shows_late(tmp_path):
    looked = threading.Event()

    class Late(type(tmp_path)):
        def exists(self, **options):
            seen = super().exists(**options)
            looked.set()
            return seen

    def appear():
        assert looked.wait(60)
        (tmp_path / "config.json").write_text("{}")

    thread = threading.Thread(target=appear)
    thread.start()
    run_folder._wait_for_folder(RunPlace(Late(tmp_path)), INFO, 60).lock.close()
    thread.join()


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(TransientError, match=r"has not seen it for 0\.1 s"):
        run_folder._wait_for_folder(RunPlace(tmp_path), INFO, 0.1)
