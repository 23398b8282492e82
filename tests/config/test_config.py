import json

import ml_collections
import pytest

from kto_jax.config import Config, ConfigError, check_overrides, default_config, resolve, to_dict


def valid() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.path = "model"
    config.data.train = "feedback.jsonl"
    return config


def test_defaults_come_from_the_dataclasses():
    config = resolve(valid())
    assert config.objective == Config().objective
    assert config.optimizer == Config().optimizer


def test_a_field_may_hold_auto_or_a_number():
    config = valid()
    config.objective.desirable_weight = "auto"
    assert resolve(config).objective.desirable_weight == "auto"
    config.objective.desirable_weight = 2
    assert resolve(config).objective.desirable_weight == 2.0


def test_the_plain_dict_of_a_config_resolves_to_the_same_config():
    config = valid()
    config.data.label_map = {"thumbs.up": True, "down": False, "plot": None}
    config.samples.judges = ("vader",)
    resolved = resolve(config)
    assert resolve(to_dict(resolved)) == resolved


def test_a_source_may_have_a_weight_and_settings_of_its_own_in_a_file_and_after_it():
    config = valid()
    mapped = {"source": "b", "weight": 2, "format": "pairs", "label_map": {"up": True, "other": None}}
    config.data.train = ("a.jsonl", mapped)
    config.data.eval = [{"source": "c", "layout": "hh"}, "d"]
    resolved = resolve(config)
    assert resolved.data.train == ("a.jsonl", {**mapped, "weight": 2.0}) and resolved.data.eval[1] == "d"
    assert resolve(json.loads(json.dumps(to_dict(resolved)))) == resolved
    config.data.train = {"source": "b"}
    assert resolve(config).data.train == ({"source": "b"},)


@pytest.mark.parametrize("split, entry, message", [
    ("train", {"source": "b", "wieght": 2.0}, r"train\[1\].wieght is not a field of a source. Did you mean 'weight'"),
    ("train", {"source": "b", "max_length": 9}, r"max_length is not a.* Allowed: .* Set config.data.max_length"),
    ("train", {"source": "b", "format": "pair"}, r"train\[1\].format='pair'.* Allowed: .*\"pairs\""),
    ("train", {"source": "b", "weight": 0}, r"train\[1\].weight=0 cannot be used. Allowed: a number above 0"),
    ("train", {"source": "b", "weight": 1e6}, "at most 1000"),
    ("train", {"source": "b", "weight": float("nan")}, "above 0"),
    ("train", {"source": "b", "weight": "much"}, "Allowed: a number"),
    ("train", {"weight": 2.0}, r"train\[1\]=.* names no source. Allowed: text, or a mapping"),
    ("train", 3, r"train\[1\]=3 names no source"),
    ("train", {"source": "b", "label_map": {"up": "yes"}}, r"train\[1\].label_map=.* Allowed: .*True, False or None"),
    ("eval", {"source": "b", "weight": 2.0}, r"eval\[1\].weight=2.0 cannot be used. Allowed: none"),
    ("eval", {"source": "b", "label_map": {"up": "yes"}}, r"eval\[1\].label_map=.* Allowed: .*True, False or None"),
])  # fmt: skip
def test_a_source_that_no_run_can_use_is_refused_in_three_parts(split, entry, message):
    config = valid()
    config.data[split] = ("a", entry)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_a_comma_separated_string_fills_a_tuple():
    config = valid()
    config.samples.judges = "vader, feedback"
    assert resolve(config).samples.judges == ("vader", "feedback")


@pytest.mark.parametrize("section, field, value, message", [
    ("objective", "beta", 0.0, r"config.objective.beta=0.0 cannot be used. Allowed: a number above 0, or \"auto\""),
    ("lora", "rank", -1, r"config.lora.rank=-1 cannot be used. Allowed: an integer, 0 \(no adapters\) or more"),
    ("lora", "alpha", 0.0, r"config.lora.alpha=0.0 cannot be used. Allowed: a number above 0"),
    ("lora", "modules_to_save", "heads", r"mean \"head\"\? Allowed: a tuple of embedding, head"),
    ("lora", "targets", ("up", "up"), r"each once"),
    ("lora", "zero", "c", r"'c' cannot be used. Allowed: \"a\" or \"b\""),
    ("objective", "beta", "x", r"config.objective.beta='x' cannot be used. Allowed: a number"),
    ("objective", "beta", True, r"config.objective.beta=True cannot be used"),
    ("objective", "desirable_weight", "much", r"'much'.*Allowed: a number above 0, or \"auto\""),
    ("model", "dtype", "float16", r"Allowed: \"float32\" or \"bfloat16\""),
    ("optimizer", "name", "adam", r"mean \"adamw\"\? Allowed: \"adamw\" or \"rmsprop\""),
    ("data", "holdout", 1.0, r"Allowed: a number, at least 0, below 1"),
    ("data", "max_prompt_length", 4096, r"below data.max_length=1024"),
    ("data", "label_map", {"good": "yes"}, r"Allowed: .*True, False or None"),
    ("mesh", "data", 0, r"-1, or an integer, 1 or more"),
    ("mesh", "fsdp", -1, r"-1 on one axis at most"),
    ("data", "train", True, r"data.train=True cannot be used. Allowed: text, or a tuple of texts and of mappings"),
])  # fmt: skip
def test_a_value_that_no_run_can_use_is_refused_in_three_parts(section, field, value, message):
    config = valid()
    config[section][field] = value
    with pytest.raises(ConfigError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    "field, value", [("margin", float("nan")), ("beta", float("inf")), ("kl_weight", float("inf"))]
)
def test_numbers_of_an_objective_are_finite(field, value):
    config = valid()
    config.objective[field] = value
    with pytest.raises(ConfigError, match=f"objective.{field}={value}"):
        resolve(config)


def test_a_fraction_is_not_an_integer_and_a_truth_value_is_not_a_number():
    for value in (1.5, True):
        config = valid()
        config.batch_size = value
        with pytest.raises(ConfigError, match=r"Allowed: an integer, 1 or more\."):
            resolve(config)


def test_missing_model_and_data_are_refused():
    with pytest.raises(ConfigError, match=r"config.model.path=''"):
        resolve(default_config())


def test_an_unknown_field_in_a_mapping_names_the_nearest():
    with pytest.raises(ConfigError, match=r"config.objective.betta is not a field.*Did you mean 'beta'"):
        resolve({"objective": {"betta": 1.0}})


@pytest.mark.parametrize("argument, message", [
    ("--config.objective.betta=1", "Did you mean 'beta'"),
    ("--config.objectiv.beta=1", "Did you mean 'objective'"),
    ("--config.seed.low=1", "config.seed.low is not a field"),
])  # fmt: skip
def test_a_misspelt_override_is_refused_with_the_nearest_name(argument, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides([argument])


def test_other_flags_are_left_alone():
    check_overrides(["--config=configs/tiny.py", "--workdir=runs/x", "--config.seed=1"])
