"""Errors that end a command, and the exit codes that say how it ended."""

FINISHED = 0
FAILED = 1
UNUSABLE = 2
PREEMPTED = 75
"""What launch scripts restart: the same command resumes the run."""
INTERRUPTED = 130


class ConfigError(ValueError):
    """The command, the configuration, or the data or model it names cannot be used: exit code 2 (`UNUSABLE`).

    The message says what was given, what is allowed and what to do.
    """


class TransientError(RuntimeError):
    """A failure that waiting may cure, such as an unreachable server: exit code 75 (`PREEMPTED`).

    The command is right, so the same command may succeed later. The message says what failed and what was tried.
    """


class OutOfMemory(RuntimeError):
    """The devices have too little memory for the run: exit code 1 (`FAILED`).

    The message names settings that need less.
    """
