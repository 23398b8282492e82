"""The flag reader, the help and the exit codes of all commands, in this process."""

import dataclasses

import pytest

from kto_jax.command import TrainOptions, print_error, read_command, read_options, run_command
from kto_jax.config import Config, ConfigError, TransientError
from kto_jax.config.ranges import Count

TINY = "--config=tiny"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of a command."""

    data: tuple[str, ...]
    """Files."""
    count: Count = 3
    """How many."""
    all: bool = False
    """Whether all."""
    name: str = ""
    """A name."""


@dataclasses.dataclass(frozen=True)
class WithConfig:
    """Flags of a command that takes a configuration."""

    config: Config | None = None
    """A recipe."""
    rows: Count = 1
    """How many rows."""


@pytest.mark.parametrize("arguments, values", [
    (["--data=a"], {"data": ("a",)}),
    (["--data", "a", "--data=b"], {"data": ("a", "b")}),
    (["-data=a", "--count", "5"], {"data": ("a",), "count": 5}),
    (["--data=a", "--all"], {"data": ("a",), "all": True}),
    (["--data=a", "--all", "--count=1"], {"data": ("a",), "all": True, "count": 1}),
    (["--data=a", "--all", "false"], {"data": ("a",), "all": False}),
    (["--data=a", "--all=True"], {"data": ("a",), "all": True}),
    (["--data=a=b", "--name=12"], {"data": ("a=b",), "name": "12"}),
    (["--data=a", "--name", "-1"], {"data": ("a",), "name": "-1"}),
    (["--data=a", "--name="], {"data": ("a",), "name": ""}),
])  # fmt: skip
def test_flags_are_read(arguments, values):
    assert read_options(Flags, arguments) == Flags(**values)


@pytest.mark.parametrize("arguments, message", [
    ([], r"--data is missing\. Allowed: Files\. Write --data=VALUE\."),
    (["a"], r"'a' is not a flag\. Allowed: --NAME=VALUE; .* Write --data=a, or"),
    (["--data"], r"--data lacks its value\. A flag is --NAME=VALUE\. Write --data=VALUE\."),
    (["--data", "--all"], r"--data lacks its value"),
    (["--data=a", "--count=0"], r"--count=0 cannot be used\. Allowed: an integer, 1 or more\. Correct --count\."),
    (["--data=a", "--count=many"], r"--count='many' cannot be used"),
    (["--data=a", "--all=perhaps"], r"--all='perhaps' cannot be used\. Allowed: True or False"),
    (["--dta=a"], r"--dta is not a flag\. Did you mean '--data'\? Allowed: --data, --count, --all, --name\. Correct"),
    (["--config=tiny"], r"--config is not a flag"),
    (["--lr=1"], r"--lr is not a flag\. Allowed: --data"),
])  # fmt: skip
def test_a_flag_that_cannot_be_used_is_refused_in_three_parts(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_options(Flags, arguments)


@pytest.mark.parametrize("arguments, message", [
    (["--config=quickstrat"], r"--config=quickstrat does not exist\. Did you mean 'quickstart'\?"),
    (["--config=kto"], r"Did you mean 'kto_chat'\? Allowed: .*kto_llama"),
    ([TINY, "--workdri=x"], r"--workdri is not a flag\. Did you mean '--workdir'\?"),
    ([TINY, "--lr=1"], r"--lr is not a flag\. Did you mean --config\.optimizer\.learning_rate\? Correct"),
    ([TINY, "--config.lr=1"], r"config\.lr is not a field.* Did you mean config\.optimizer\.learning_rate\? Correct"),
    ([TINY, "--config.optimizer.learning_rat=1"], r"Did you mean 'learning_rate'\? Allowed: name, learning_rate"),
    ([TINY, "--config.max_len=9"], r"Did you mean config\.data\.max_length\?"),
    ([TINY, "--config.path=x"], r"Did you mean config\.model\.path\?"),
    ([TINY, "--config.KTO=1"], r"Did you mean config\.objective\.name=kto\?"),
    ([TINY, "--config.adam=1"], r"Did you mean config\.optimizer\.name=adamw\?"),
    ([TINY, "--config.optimizer=adam"], r"is a section\. Its fields are name, learning_rate, .* Write --config\.opt"),
    ([TINY, "--config.optimizer.name=adam"], r"Did you mean \"adamw\"\?"),
    ([TINY, "--config.xyzzy=1"], r"config\.xyzzy is not a field of the configuration\. Allowed: seed, batch_size"),
    (["--config.seed=1"], r"--config\.seed is set, and --config is missing\. Set --config=RECIPE\."),
    ([], r"--config is missing\. Allowed: Recipe of configs/"),
])  # fmt: skip
def test_a_misspelt_recipe_field_or_value_gets_the_nearest(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read_options(TrainOptions, arguments)


def test_a_flag_of_the_command_is_nearer_than_a_field_that_is_less_alike():
    with pytest.raises(ConfigError, match="Did you mean '--rows'"):
        read_options(WithConfig, ["--row=3"])
    with pytest.raises(ConfigError, match=r"Did you mean --config\.row_length\?"):
        read_options(WithConfig, ["--row_len=3"])


def test_fields_are_set_over_those_of_the_recipe_and_the_folder_is_named_after_it():
    config, workdir = read_command([TINY, "--config.optimizer.learning_rate", "1e-4", "--config.epochs=2"])
    assert (config.optimizer.learning_rate, config.epochs, config.optimizer.warmup_steps) == (1e-4, 2, 5)
    assert str(workdir) == "runs/tiny"
    assert str(read_command([TINY, "--workdir=elsewhere"])[1]) == "elsewhere"


@pytest.mark.parametrize("outcome, code, line", [
    (0, 0, ""),
    (1, 1, ""),
    (ConfigError("a is wrong."), 2, "error: a is wrong.\n"),
    (TransientError("b is away."), 75, "error: b is away.\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])  # fmt: skip
def test_how_a_command_ended_is_its_exit_code_and_one_line(capsys, outcome, code, line):
    def command(flags):
        assert flags == Flags(data=("a",))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert run_command(command, Flags, "About.", ["--data=a"]) == code
    assert capsys.readouterr().err == line


def test_a_flag_that_cannot_be_used_ends_the_command_with_2_before_it_runs(capsys):
    assert run_command(lambda flags: pytest.fail("it ran"), Flags, "About.", ["--count=0"]) == 2
    assert capsys.readouterr().err.startswith("error: --count=0 cannot be used.")


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help_shows_every_flag_with_its_range_default_and_documentation(capsys, flag):
    assert run_command(lambda flags: pytest.fail("it ran"), Flags, "About.", ["--count=0", flag]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("About.\n\nFLAGS\n\n  --data\n")
    assert "  --count\n      [an integer, 1 or more; default: 3]\n      How many." in shown
    assert "CONFIGURATION" not in shown


def test_the_help_of_a_command_with_a_configuration_shows_its_fields(capsys):
    assert run_command(lambda flags: 0, WithConfig, "About.", ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config.optimizer.learning_rate\n      [a number above 0; default: 5e-06]" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_error_cannot_steer_the_terminal(capsys):
    print_error("row 3 holds \x1b]0;title\x07")
    assert capsys.readouterr().err == "error: row 3 holds \\x1b]0;title\\x07\n"
