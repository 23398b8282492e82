"""Common parts of all commands: flags, help, errors and exit codes.

A command declares its flags as a frozen dataclass, whose fields have types, ranges and documentation as those of the
configuration do. A field `config: Config` takes `--config=RECIPE` and `--config.FIELD=VALUE`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kto_jax.config import Config, ConfigError, OutOfMemory, TransientError, resolve
from kto_jax.config.convert import convert, hints, parse
from kto_jax.config.documentation import config_table, documentation, table
from kto_jax.config.errors import FAILED, FINISHED, INTERRUPTED, PREEMPTED, UNUSABLE
from kto_jax.config.names import closest
from kto_jax.config.ranges import base
from kto_jax.config.recipes import load
from kto_jax.config.resolve import suggest_elsewhere, type_of
from kto_jax.config.secrets import check_no_secrets

__all__ = [
    "FAILED",
    "FINISHED",
    "INTERRUPTED",
    "PREEMPTED",
    "UNUSABLE",
    "TrainOptions",
    "answer_help",
    "print_error",
    "read_command",
    "read_options",
    "run_command",
    "visible",
]

T = TypeVar("T")
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
"""Errors that a disk causes and no change of the program cures."""


def run_command(command: Callable[[T], int], kind: type[T], about: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and turns its exceptions into one line and an exit code.

    Args:
      command: takes the flags and returns an exit code.
      kind: the dataclass of its flags.
      about: what `--help` prints above them.
      arguments: the command line without the program; that of this process by default.

    Returns:
      The exit code: 2 for a ConfigError, 75 for a TransientError, 1 for OutOfMemory and for a disk that cannot be
        written, 130 for Ctrl-C, else the command's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_help(arguments):
        _print_help(kind, about)
        return FINISHED
    try:
        return command(read_options(kind, arguments))
    except ConfigError as error:
        print_error(error)
        return UNUSABLE
    except TransientError as error:
        print_error(error)
        return PREEMPTED
    except OutOfMemory as error:
        print_error(error)
        return FAILED
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        print_error(
            f"{error}. The command writes to its folder, to the cache and to the folder for temporary files; each must "
            "be writable and have space left. Free some space or correct the permissions, and run it again."
        )
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def print_error(error: Exception | str) -> None:
    """Prints an error on standard error, in red on a terminal."""
    line = f"error: {visible(str(error))}"
    print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr)


def visible(text: str) -> str:
    """The text with its control characters spelt out, so that text of a model or a file cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def answer_help(kind: type, about: str) -> None:
    """Prints the help and exits if the command line asks for it, before a command's slow imports.

    Args:
      kind: the dataclass of the command's flags.
      about: what is printed above them.
    """
    if asks_for_help(sys.argv[1:]):
        _print_help(kind, about)
        sys.exit(FINISHED)


def _print_help(kind: type, about: str) -> None:
    try:
        print(help_text(kind, about), flush=True)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ("-h", "-help", "--help", "--helpfull", "--helpshort") for argument in arguments)


def help_text(kind: type, about: str) -> str:
    """The text of `--help`: what the command does, its flags, and the configuration's fields if it takes any."""
    parts = [about.strip(), "FLAGS", table(kind, "--")]
    if "config" in hints(kind):
        parts += ["CONFIGURATION: --config=RECIPE sets its fields, --config.FIELD=VALUE one of them", config_table()]
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Flags of training."""

    config: Config
    """Recipe of configs/ by its name, or the path of a config file."""
    workdir: str = ""
    """Folder of the run, also in a bucket (gs://BUCKET/RUN); the same command resumes a run found there. Empty is
    runs/NAME for the recipe NAME."""


def read_command(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The resolved configuration and the run's folder, from the flags of training.

    Raises:
      ConfigError: a flag or a field cannot be used.
    """
    given = read_options(TrainOptions, arguments)
    return given.config, Path(given.workdir)


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """Reads the flags of a command.

    `--name=value` and `--name value` are the same; a boolean flag may omit its value; one of texts may be repeated.

    Args:
      kind: the dataclass of its flags; those without a default are required.
      arguments: the command line without the program.

    Raises:
      ConfigError: a flag is unknown, lacks its value, cannot be used or is missing.
    """
    for number, argument in enumerate(arguments, start=1):  # before an error shows a value
        check_no_secrets({"": argument}, f"argument {number} of the command line")
    values: dict[str, Any] = {}
    recipe, overrides = "", dict[str, Any]()
    for name, text, hint in _flags(kind, arguments):
        if name == "config":
            recipe = text
        elif name.startswith("config."):
            overrides[name.removeprefix("config.")] = parse(text, hint)
        elif hint == tuple[str, ...]:
            values[name] = (*values.get(name, ()), text)
        else:
            values[name] = convert(parse(text, hint), hint, f"--{name}")
    if recipe:
        path, config = load(recipe)
        values["config"] = resolve(_with_overrides(config, overrides))
        if "workdir" in hints(kind) and not values.get("workdir"):
            values["workdir"] = str(Path("runs") / path.stem)
    elif overrides:
        raise ConfigError(f"--config.{next(iter(overrides))} is set, and --config is missing. Set --config=RECIPE.")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is dataclasses.MISSING:
            what = documentation(kind)[field.name]
            raise ConfigError(f"--{field.name} is missing. Allowed: {what} Write --{field.name}=VALUE.")
    return kind(**values)


def _flags(kind: type, arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Each flag's name, the text of its value, and its type."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            raise ConfigError(_not_a_flag(argument, kind))
        name, equals, text = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        hint = _type_of_flag(name, kind)
        if not equals:
            is_boolean = base(hint) is bool
            if rest and (rest[0].lower() in ("true", "false") if is_boolean else not rest[0].startswith("--")):
                text = rest.pop(0)
            elif is_boolean:
                text = "true"
            else:
                raise ConfigError(f"--{name} lacks its value. A flag is --NAME=VALUE. Write --{name}=VALUE.")
        yield name, text, hint


def _type_of_flag(name: str, kind: type) -> Any:
    known = hints(kind)
    if name.startswith("config.") and "config" in known:
        hint = type_of(name.removeprefix("config."))
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            fields = ", ".join(hints(hint))
            raise ConfigError(f"--{name} is a section. Its fields are {fields}. Write --{name}.FIELD=VALUE.")
        return hint
    if name not in known:
        raise ConfigError(_unknown_flag(name, kind))
    return known[name]


def _unknown_flag(name: str, kind: type) -> str:
    if "config" in hints(kind) and (field := suggest_elsewhere(name, hints(kind))):
        return f"--{name} is not a flag. Did you mean --config.{field}? Correct the command; --help lists all flags."
    flags = [f"--{flag}" for flag in hints(kind)] + (["--config.FIELD"] if "config" in hints(kind) else [])
    close = closest(name, hints(kind))
    meant = f"Did you mean '--{close}'? " if close else ""
    return f"--{name} is not a flag. {meant}Allowed: {', '.join(flags)}. Correct the command."


def _not_a_flag(argument: str, kind: type) -> str:
    first = next(iter(hints(kind)))
    return (
        f"{argument!r} is not a flag. Allowed: --NAME=VALUE; --help lists the names. Write --{first}={argument}, or "
        "the flag that it belongs to."
    )


def _with_overrides(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A configuration with fields replaced, by their dotted names."""
    config = dict(config)
    for name, value in overrides.items():
        section, dot, field = name.partition(".")
        config[section] = _with_overrides(config.get(section, {}), {field: value}) if dot else value
    return config
