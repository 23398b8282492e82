"""What loaders do in the tests, in a module that they import without JAX and pytest."""

import os
import signal

import numpy as np


def pid_of_step(step):
    return os.getpid()


def note(path, step):
    with open(path, "a") as file:
        file.write(f"{step}\n")
    return step


def growing(step):
    return {
        "step": step,
        "a": np.arange(1000 * (step % 3)),
        "b": np.full((3, step), step)[:, ::2],
        "c": np.float32(step),
    }


class StrangeError(Exception):
    """One that cannot be pickled back."""

    def __init__(self, first, second):
        super().__init__(first)


def refuse(kind, step):
    if step == 3:
        raise {"plain": ValueError("bad row"), "strange": StrangeError("bad", "row")}[kind]
    return step


def end_itself(how, step):
    if step == 3 and how == "exit":
        os._exit(7)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step


def send_big(step):
    return bytes(1 << 20)


def where_jax_would_run(step):
    import jax

    return jax.config.jax_platforms


def signalled(step):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return step, os.environ["JAX_PLATFORMS"]
