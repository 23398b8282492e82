"""F8: damaged files in a run's folder, and a disk that cannot be written, end a command with one line."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kto_jax.command import run_command
from kto_jax.config import Config, ConfigError, to_dict
from kto_jax.models.families.config_json import read_config_json, write_config_json
from kto_jax.training.logs import MetricsLog, read_metrics
from kto_jax.training.pinning import pin_sources
from kto_jax.training.resume import with_recorded_settings
from kto_jax.training.run_folder import check_folder, record_part
from tests import ROOT, TINY_MODEL

ROW = b'{"step": 1, "loss": 0.5}\n'
NESTED = b"[" * 100_000
JUNK = [b"\xff\xfe\n", b'{"loss": 1}\n', b'["step", 2]\n', b"2\n", b"\n", b'{"step": null}\n', NESTED + b"\n"]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_a_damaged_row_of_metrics_is_named(tmp_path, junk):
    (tmp_path / "metrics.jsonl").write_bytes(ROW + junk + ROW.replace(b"1", b"2"))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2 is damaged\. Each line .* Restore"):
        MetricsLog(tmp_path, 2, 4)


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\0\0\0\0", b"\xff", b"[2"])
def test_what_a_power_cut_leaves_after_the_last_row_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(ROW + tail)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def tiny():
    return read_config_json(json.loads((TINY_MODEL / "config.json").read_text()))


@pytest.fixture
def run(tmp_path):
    """The first files of a run, and the index that it was started with."""
    index = SimpleNamespace(manifest={"content_sha256": "x"})
    files = {"config": to_dict(Config()), "model": write_config_json(tiny()), "manifest": index.manifest}
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    check_folder(tmp_path, Config(), index, tiny())
    return tmp_path, index


@pytest.mark.parametrize("name", ["config", "model", "manifest"])
@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"[]", b"null", b'"x"', b'{"seed": ', NESTED], ids=range(7))
def test_a_damaged_file_of_the_run_is_refused_in_one_line(run, name, junk):
    path, index = run
    (path / f"{name}.json").write_bytes(junk)
    config = with_recorded_settings(Config(), path)
    with pytest.raises(ConfigError, match="is not a run that can be resumed: ") as refusal:
        check_folder(path, config, index, tiny())
    assert "\n" not in str(refusal.value)
    assert pin_sources(config, path) == config


@pytest.mark.parametrize("section", [None, "x", [1], {"name": 3}])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_a_recorded_setting_of_another_kind_is_another_run(run, name, section):
    path, index = run
    (path / "config.json").write_text(json.dumps(to_dict(Config()) | {name: section}))
    config = with_recorded_settings(Config(), path)
    try:
        check_folder(path, config, index, tiny())  # Some may differ.
    except ConfigError as refusal:
        assert str(refusal).startswith(f"--workdir={path} holds ")


@pytest.mark.parametrize("junk", [b"\xff\n", b"{}\n", b"[1]\n", b"{\n", b'{"first_step": null}\n'])
def test_a_damaged_history_is_named(tmp_path, junk):
    record_part(tmp_path, 0, Config())
    with (tmp_path / "config_history.jsonl").open("ab") as file:
        file.write(junk)
    with pytest.raises(ConfigError, match=r"config_history\.jsonl is damaged: .* or remove it"):
        record_part(tmp_path, 3, Config())


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """None."""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_cannot_be_written_ends_a_command_with_one_line(capsys, number):
    def command(flags):
        raise OSError(number, os.strerror(number), "runs/mine/file")

    assert run_command(command, NoFlags, "About.", []) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: [Errno {number}] {os.strerror(number)}: 'runs/mine/file'. The command writes")
    assert message.count("\n") == 1


def test_an_error_that_no_disk_causes_keeps_its_traceback():
    def command(flags):
        raise FileNotFoundError(errno.ENOENT, "of our own making")

    with pytest.raises(FileNotFoundError):
        run_command(command, NoFlags, "About.", [])


HANGING = """
import runpy, signal, sys, threading, time
import kto_jax.command

def sleep(before):
    while signal.getsignal(signal.SIGTERM) == before:
        time.sleep(1e-3)
    print("hanging", file=sys.stderr, flush=True)
    time.sleep(600)

def hang(*arguments):
    threading.Thread(target=sleep, args=[signal.getsignal(signal.SIGTERM)]).start()
    {ending}

kto_jax.command.run_command = hang
runpy.run_module("kto_jax.{command}", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "ending", "code"),
    [
        ("train", "return 75", 75),
        *(
            pytest.param(*each, marks=pytest.mark.nightly)
            for each in (("train", "raise RuntimeError", 1), ("train", "sys.exit(75)", 75), ("online", "return 75", 75))
        ),
    ],
)
def test_a_run_that_hangs_at_its_end_is_ended_by_sigterm_with_its_own_code(command, ending, code):
    program = [sys.executable, "-c", HANGING.format(command=command, ending=ending)]
    process = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "hanging" not in process.stderr.readline():  # perhaps in the middle of a traceback
        assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    process.communicate()
    assert process.returncode == code
