"""From a config file and overrides to a checked, frozen `Config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kto_jax.config.convert import convert, hints, is_section
from kto_jax.config.errors import ConfigError
from kto_jax.config.fields import OBJECTIVE_NAMES, Config
from kto_jax.config.names import closest, nearest, similarity
from kto_jax.config.packages import require
from kto_jax.config.ranges import choices
from kto_jax.config.rules import check
from kto_jax.config.secrets import check_no_secrets

if TYPE_CHECKING:
    import ml_collections


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a `ConfigDict`, for config files to start from.

    Every field accepts any type here (a ConfigDict would otherwise refuse a number where it holds "auto"); `resolve`
    checks the types.

    Raises:
      ConfigError: ml_collections is not installed.
    """
    require("ml_collections", "default_config()", "let get_config() return a dict of the fields to set")
    return _to_config_dict(Config())


def _to_config_dict(section: Any) -> ml_collections.ConfigDict:
    # Not at the top: code that makes a `Config` of its own does without ml_collections.
    import ml_collections

    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = _to_config_dict(value)
        else:
            result[field.name] = ml_collections.FieldReference(value, field_type=object)
    return result


def one_host_config() -> ml_collections.ConfigDict:
    """What the recipes of configs/ start from: Llama-3.1-8B-Instruct, sharded over the chips of one host by fsdp."""
    config = default_config()
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.microbatch_rows = 16
    return config


def online_config() -> ml_collections.ConfigDict:
    """What the recipes of online training start from: `one_host_config` on prompts, at a constant learning rate."""
    config = one_host_config()
    config.data.train = "prompts.jsonl"
    config.batch_size = 128
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 10
    return config


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` (or nested mapping) into a checked, frozen `Config`; touches no device and no file.

    Raises:
      ConfigError: a field is unknown, has the wrong type or a value that is not allowed, or holds a secret.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    check_no_secrets(values, "config")  # before an error shows a value
    resolved = _build(Config, values, "config")
    check(resolved)
    return resolved


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict of a resolved config: what config.json holds, and what `resolve` reads back."""
    return dataclasses.asdict(config)


def fields_of(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Every field of a configuration: its dotted name, the section that owns it, and the field itself."""
    for field in dataclasses.fields(kind):
        hint = hints(kind)[field.name]
        if is_section(hint):
            yield from fields_of(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field


def type_of(name: str) -> Any:
    """The type of a field, by its dotted name without `config.`.

    Raises:
      ConfigError: there is no such field; names the nearest.
    """
    kind: Any = Config
    path = "config"
    for part in name.split("."):
        if not is_section(kind) or part not in hints(kind):
            raise ConfigError(unknown(path, part, hints(kind) if is_section(kind) else ()))
        kind, path = hints(kind)[part], f"{path}.{part}"
    return kind


def check_overrides(arguments: Iterable[str]) -> None:
    """Refuses command-line overrides (`--config.section.field=value`) of fields that do not exist.

    Raises:
      ConfigError: naming the nearest field.
    """
    for argument in arguments:
        if argument.lstrip("-").startswith("config."):
            type_of(argument.lstrip("-").split("=")[0].removeprefix("config."))


def suggest_elsewhere(name: str, allowed: Iterable[str]) -> str | None:
    """The field that was probably meant by a name, wherever it is, if none of the allowed names is as much like it.

    A value that only one field takes stands for that field: `adam` for `optimizer.name=adamw`.

    Returns:
      Its dotted name without `config.`, with "=VALUE" if a value was given; None if an allowed name is nearer.
    """
    here = max((similarity(name, candidate) for candidate in allowed), default=0.0)
    fields, values = dict[str, str](), dict[str, str]()
    for full, kind, field in fields_of():
        fields.setdefault(full.rsplit(".", 1)[-1], full)
        known = OBJECTIVE_NAMES if full == "objective.name" else choices(hints(kind)[field.name])
        for value in known:
            values.setdefault(str(value), f"{full}={value}")
    for candidates in (fields, values):
        found = closest(name, candidates)
        if found and similarity(name, found) > here:
            return candidates[found]
    return None


def unknown(path: str, name: str, allowed: Iterable[str]) -> str:
    """The error message for a field that does not exist: the nearest name here or in another section."""
    start = f"{path}.{name} is not a field of the configuration."
    allowed = list(allowed)
    if field := suggest_elsewhere(name, allowed):
        return f"{start} Did you mean config.{field}? Correct the name; --help lists all fields."
    return f"{start} {nearest(name, allowed)}" if allowed else f"{start} {path} is a field itself. Set {path}."


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds one section, refusing unknown fields."""
    arguments = {}
    for name, value in values.items():
        hint = hints(kind).get(name)
        if hint is None:
            raise ConfigError(unknown(path, name, hints(kind)))
        if not is_section(hint):
            arguments[name] = convert(value, hint, f"{path}.{name}")
        elif isinstance(value, Mapping):
            arguments[name] = _build(hint, value, f"{path}.{name}")
        else:
            raise ConfigError(f"{path}.{name}={value!r} is not a section. Set its fields: {path}.{name}.FIELD=...")
    return kind(**arguments)
