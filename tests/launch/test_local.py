"""launch/local.sh: several processes of one run on this machine."""

import re
import signal
import time

import pytest

from tests.launch.machine import alive, python


def test_local_starts_every_rank_of_one_job(machine):
    show = 'names = ("COORDINATOR_ADDRESS", "COORDINATOR_BIND_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")\n'
    show += 'print(*(os.environ["JAX_" + name] for name in names), sys.argv[1])'
    code, out, _ = machine.run("local.sh", "3", "--", *python(show), "an argument")
    assert code == 0
    address = out.split()[0]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    assert sorted(out.splitlines()) == [f"{address} {address} 3 {rank} an argument" for rank in range(3)]


def test_local_ends_the_others_when_one_fails_and_returns_its_code(machine):
    text = """
rank = os.environ["JAX_PROCESS_ID"]
if rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), file=open("pids", "a"))
if rank == "2":
    while len(open("pids").readlines()) < 3:
        time.sleep(0.01)
    sys.exit(3)
time.sleep(600)
"""
    started = time.monotonic()
    code, _, err = machine.run("local.sh", "3", "--", *python(text))
    assert code == 3 and "process 2 ended with exit code 3" in err
    assert 1 <= time.monotonic() - started < 15
    assert len(machine.lines("pids")) == 3
    assert not any(alive(int(pid)) for pid in machine.lines("pids"))


def test_local_waits_for_the_others_to_save_when_one_was_preempted(machine):
    text = """
if os.environ["JAX_PROCESS_ID"] == "0":
    sys.exit(75)
time.sleep(0.5)
print("saved", file=open("saved", "a"))
sys.exit(75)
"""
    code, _, _ = machine.run("local.sh", "2", "--", *python(text), KTO_GRACE_SECONDS="20")
    assert code == 75 and machine.lines("saved") == ["saved"]


def test_local_waits_for_the_others_when_one_has_finished(machine):
    text = 'time.sleep(0.5 * int(os.environ["JAX_PROCESS_ID"]))\nprint("finished", file=open("finished", "a"))'
    code, _, _ = machine.run("local.sh", "2", "--", *python(text), KTO_GRACE_SECONDS="0")
    assert code == 0 and len(machine.lines("finished")) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_forwards_signals_to_all_processes(machine, number, code):
    text = f"""
def leave(number, frame):
    print(number, file=open("heard", "a"))
    sys.exit({code})
signal.signal({number:d}, leave)
print("ready", file=open("ready", "a"))
time.sleep(600)
"""
    process = machine.start("local.sh", "2", "--", *python(text))
    machine.wait_for("ready", 2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert machine.lines("heard") == [f"{number:d}"] * 2


def test_local_leaves_nothing_behind_when_interrupted_twice(machine):
    text = """
signal.signal(signal.SIGINT, lambda number, frame: print("heard", file=open("heard", "a")))
print(os.getpid(), file=open("pids", "a"))
while len(open("heard", "a+").readlines()) < 100:
    time.sleep(0.05)
    if os.path.exists("give_up"):
        sys.exit(9)
"""
    process = machine.start("local.sh", "2", "--", *python(text))
    machine.wait_for("pids", 2)
    process.send_signal(signal.SIGINT)
    machine.wait_for("heard", 2)
    process.send_signal(signal.SIGINT)
    machine.wait_for("heard", 4)
    (machine.folder / "give_up").touch()
    process.communicate(timeout=20)
    assert process.returncode == 9
    assert not any(alive(int(pid)) for pid in machine.lines("pids"))
