"""The library that completes prompts, on a tiny random policy."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax.config import CheckpointConfig, ConfigError, LoraConfig
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.lora import init_adapters, with_magnitudes
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from kto_jax.models.weights.peft import save_adapters
from kto_jax.sampling import complete as complete_module
from kto_jax.sampling.complete import LanguageModel, complete, open_language_model, with_adapters
from kto_jax.sampling.logps import completion_logps
from kto_jax.sampling.sample import Sampled, Sampling
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.run_folder import write_json
from tests.sampling.tiny import TINY, export

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run"))


def opened(model, params, tokenizer):
    return LanguageModel(model, tokenizer, lambda: params)


def test_no_samples_are_refused_before_anything_is_encoded():
    with pytest.raises(ConfigError, match="num_samples=0"):
        complete(LanguageModel(None, None, None), ["x"], num_samples=0)


def test_a_completion_that_ends_says_so_and_every_eos_of_the_model_ends_it(exported, monkeypatch):
    _, model, params, tokenizer = exported
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=(7, 9)))
    tokenizer = dataclasses.replace(tokenizer, stop_ids=(tokenizer.eos_id, 11))
    asked = {}

    def sample(model, params, prompts, sampling, **arguments):
        asked.update(arguments)
        drawn = [np.asarray(ids) for ids in ([5, 7], [5, tokenizer.eos_id], [7, 5])]
        return [Sampled(ids, np.float32([-0.5, -0.25])) for ids in drawn]

    monkeypatch.setattr(complete_module, "sample_with_logps", sample)
    found = complete(opened(model, params, tokenizer), ["Say it."], num_samples=3)
    assert [completion.ended for completion in found] == [True, True, False]
    assert found[0].logps == (-0.5, -0.25) and found[0].prompt_ids == found[2].prompt_ids != ()
    assert asked["eos_id"] == sorted({7, 9, 11, tokenizer.eos_id})
    assert asked["batch_size"] == 3


def test_all_devices_complete_and_measure_as_one_does(exported):
    run, found, measured = str(exported[0]), [], []
    for devices in ("one", "all"):
        with open_language_model(run, devices=devices) as model:
            assert (model.placed.shardings is None) == (devices == "one")
            completions = complete(model, ["Name a film.", "Say it.", "Why?"], Sampling(max_new_tokens=8), batch_size=3)
            found.append(completions)
            ids = [[np.asarray(ids, np.int32) for ids in (c.prompt_ids, c.ids)] for c in completions]
            measured.append(completion_logps(model.model, model.params, *zip(*ids, strict=True)))
    one, several = found
    assert [completion.ids for completion in one] == [completion.ids for completion in several]
    np.testing.assert_allclose(measured[1], measured[0], atol=1e-4)
    np.testing.assert_allclose([sum(completion.logps) for completion in several], measured[0], atol=1e-4)


def test_adapters_complete_on_all_devices_as_on_one(exported, tmp_path):
    run, model, params, _ = exported
    lora = LoraConfig(rank=2, alpha=8.0, targets=("query", "down"), dora=True)
    drawn = with_magnitudes(init_adapters(params, lora, jax.random.key(1)), params)
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), drawn)
    save_adapters(
        tmp_path / "adapter", model, trained, lora=lora, base=str(run / "policy"), tokenizer_dir=None, model_card=""
    )
    found = []
    for devices in ("one", "all"):
        with open_language_model(str(run), devices=devices) as base:
            adapted = with_adapters(base, str(tmp_path / "adapter"), "the base")
            found.append([complete(each, ["Say it."], GREEDY)[0] for each in (base, adapted)])
    one, several = found
    assert [completion.ids for completion in one] == [completion.ids for completion in several]
    np.testing.assert_allclose(several[1].logps, one[1].logps, atol=1e-4)
    assert one[0].logps != one[1].logps


def test_a_runs_newest_checkpoint_is_taken_until_its_policy_is_exported(exported, tmp_path):
    run, _, params, _ = exported
    save_checkpoint(tmp_path, params)
    shutil.copytree(TINY, tmp_path / "tokenizer")
    for devices in ("one", "all"):
        with open_language_model(str(tmp_path), devices=devices) as found:
            assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))
            assert len(found.params["embed"]["table"].devices()) == (1 if devices == "one" else 8)
    shutil.copytree(run / "policy", tmp_path / "policy")
    shutil.rmtree(tmp_path / "checkpoints")
    with open_language_model(str(tmp_path)) as found:
        assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))


def save_checkpoint(workdir, policy):
    """A run's folder that holds a checkpoint of `policy` alone, and no export yet."""
    write_json(workdir / "model.json", write_config_json(read_config(TINY)))
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    state = types.SimpleNamespace(
        step=jnp.int32(1), policy=policy, opt_state={"mean": jnp.zeros(2)}, num_bad_steps=jnp.int32(0),
        objective_state={}, reference={},
    )  # fmt: skip
    checkpoints.save(1, state, None)
    checkpoints.close()


def test_a_reward_model_is_refused_before_its_weights_are_read(tmp_path):
    model = Model.create(read_config(TINY), scalar_head="reward")
    params = model.init_params(jax.random.key(0), "float32")
    save_checkpoint(tmp_path, params)
    shutil.copytree(TINY, tmp_path / "tokenizer")
    refusal = r"a reward model, which .* language model is needed here\. Choose .* python -m kto_jax\.score"
    with pytest.raises(ConfigError, match=refusal):
        complete(str(tmp_path), ["x"])
    save_hugging_face(tmp_path / "policy", model, params, tokenizer_dir=None, model_card="")
    (tmp_path / "policy" / "model.safetensors").unlink()
    for path in (tmp_path, tmp_path / "policy"):
        with pytest.raises(ConfigError, match=refusal):
            complete(str(path), ["x"])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [(Sampling(max_new_tokens=5000), "context of 2048"), (Sampling(top_p=2.0), "top_p=2.0 cannot be used")],
)
def test_what_cannot_be_sampled_is_refused_before_the_weights_are_read(exported, sampling, message):
    _, model, _, tokenizer = exported

    def load():
        raise AssertionError("the weights were read")

    with pytest.raises(ConfigError, match=message):
        complete(LanguageModel(model, tokenizer, load), ["Say it."], sampling)


def test_a_path_is_opened_and_completes_as_its_model_does(exported):
    run, model, params, tokenizer = exported
    sampling = Sampling(temperature=0, max_new_tokens=4)
    found = complete(str(run), ["Say it."], sampling)
    assert found == complete(opened(model, params, tokenizer), ["Say it."], sampling)


def test_a_model_that_is_opened_once_starts_one_tokenizing_process_for_all_its_calls(exported, monkeypatch):
    started, workers = [], tokenize.Workers
    monkeypatch.setattr(tokenize, "Workers", lambda *arguments: started.append(1) or workers(*arguments))
    with open_language_model(str(exported[0])) as found:
        for _ in range(2):
            complete(found, ["Say it."], Sampling(max_new_tokens=2))
    assert started == [1]


def test_a_policy_with_a_value_scorer_writes_as_it_would_without(exported, tmp_path):
    _, model, params, tokenizer = exported
    scored = Model.create(model.config, scalar_head="value").init_params(jax.random.key(0), "float32")["scorer"]
    save_checkpoint(tmp_path, params | {"scorer": scored})
    shutil.copytree(tokenizer.directory, tmp_path / "tokenizer")
    with open_language_model(str(tmp_path)) as found:
        assert "scorer" in found.params
        written = complete(found, ["Say it."], Sampling(max_new_tokens=6))
    assert written == complete(opened(model, params, tokenizer), ["Say it."], Sampling(max_new_tokens=6))


def test_a_completion_prefix_is_read_after_the_prompt_as_training_reads_a_control(exported, monkeypatch):
    _, model, params, tokenizer = exported
    seen = []

    def sample(model, params, prompts, sampling, **options):
        seen.extend(prompts)
        return [Sampled(np.array([5], np.int32), np.float32([-1])) for _ in prompts]

    monkeypatch.setattr(complete_module, "sample_with_logps", sample)
    for prefix in ("", "<|good|>"):
        complete(opened(model, params, tokenizer), ["Say it."], completion_prefix=prefix)
    control = tokenize.encode_text(tokenizer, "<|good|>")
    assert len(control) > 0
    np.testing.assert_array_equal(seen[1], np.concatenate([seen[0], control]))
