"""Runs kto_jax.online and kills itself, as a power cut would: python -m tests.commands.killed_online POINT FLAGS."""

import contextlib
import os
import signal
import sys

import kto_jax.online
from kto_jax.sampling.slots import Slots
from kto_jax.training.checkpoints import Checkpoints


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def in_round_1(call, *, then=kill, calls=1):
    """The function, which calls `then` when it is called for the n-th time in the second round."""
    left = [calls]

    def called(*args, **kwargs):
        if rounds[-1] == 1:
            left[0] -= 1
            if not left[0]:
                then()
        return call(*args, **kwargs)

    return called


rounds = [0]
run_round = kto_jax.online._Online.run_round


def counted(self, number, preemption):
    rounds.append(number)
    return run_round(self, number, preemption)


def main(point, *flags):
    kto_jax.online._Online.run_round = counted
    if point == "sampling":
        Slots.decode = in_round_1(Slots.decode, calls=2)
    elif point == "update":
        kto_jax.online.train = in_round_1(kto_jax.online.train)
    else:  # after the fifth checkpoint of the round, in its second epoch
        Checkpoints.save = in_round_1(Checkpoints.save, calls=6)
    with contextlib.suppress(SystemExit):
        kto_jax.online.main(flags)
    print("it was not killed", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
