"""kto-jax COMMAND --FLAG=VALUE ...: align language models from thumbs-up and thumbs-down.

COMMAND --help lists the flags of a command. `python -m kto_jax.COMMAND` is the same.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from kto_jax.config.errors import FINISHED, UNUSABLE
from kto_jax.config.names import nearest

COMMANDS = {
    "train": "trains a policy from feedback; the same command resumes a run",
    "online": "trains a policy on its own completions, scored by rewards, round by round",
    "inspect": "explains feedback without training: what is read, rejected and trained on",
    "plan": "compiles the training step for TPUs that are not here: does it fit, how fast can it be",
    "chat": "a page to chat with a model, press thumbs on its answers and train on them",
    "generate": "samples completions from a run or a model",
    "evaluate": "measures a policy on held-out feedback and against a baseline, by judges, with intervals",
    "compare": "compares runs: settings, curves, verdicts and samples on one page",
    "export": "exports a checkpoint of a run: merged, as adapters, as GGUF, to the Hub",
    "verify": "checks a run or an exported model for damaged files",
    "score": "scores completions with a reward model",
    "curves": "draws the value functions of the losses",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code if there is none to run.

    Args:
      arguments: the command line without the program; that of this process by default.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
        print("\n".join([str(__doc__).strip(), "", "Commands:", *lines]))
        return FINISHED if arguments else UNUSABLE
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command. {nearest(name, COMMANDS)} Correct the command.", file=sys.stderr)
        return UNUSABLE
    sys.argv = [f"kto-jax {name}", *rest]
    runpy.run_module(f"kto_jax.{name}", run_name="__main__", alter_sys=True)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
