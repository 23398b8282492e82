"""The library that scores completions, on a tiny random reward model."""

import contextlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.rejection import Rejection
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.rewards import reward_model
from kto_jax.rewards.functions import Scored, open_rewards, total_rewards
from kto_jax.rewards.reward_model import (
    RewardModel,
    completions_to_score,
    open_reward_model,
    reward,
    score_rows,
    score_sequences,
    settings_of_run,
)
from tests import ROOT
from tests.rewards.tiny import CHAT, ROWS, TINY, export, naive, places, write


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run"))


def test_scores_do_not_depend_on_the_batch_and_few_shapes_are_compiled(exported):
    _, model, params, tokenizer = exported
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 512, size) for size in (1, 64, 65, 200, 64, 65, 1)]
    reward_model._score_batch.clear_cache()
    found = score_sequences(RewardModel(model, params, tokenizer), sequences, batch_size=2)
    assert reward_model._score_batch._cache_size() == 3  # Lengths 64, 128 and 256.
    np.testing.assert_allclose(found, [naive(model, params, ids) for ids in sequences], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        score_sequences(RewardModel(model, params, tokenizer), sequences, batch_size=5), found, atol=1e-5
    )
    assert score_sequences(RewardModel(model, params, tokenizer), [], batch_size=2).shape == (0,)


def test_all_devices_score_as_one_does(exported):
    run = exported[0]
    completions = ["Jaws.", "Heat, of course.", "Fine."]
    with open_reward_model(str(run)) as one, open_reward_model(str(run), devices="all") as all_devices:
        assert all_devices.placed.shardings is not None
        expected = reward(one, ["Name a film."] * 3, completions, batch_size=3)
        found = reward(all_devices, ["Name a film."] * 3, completions, batch_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_long_prompt_is_cut_from_the_left_as_in_training(exported):
    _, model, params, tokenizer = exported
    data = DataConfig(max_length=40, max_prompt_length=20)
    rows = places([{"prompt": "word " * 100, "completion": "Good."}])
    (row,) = score_rows(RewardModel(model, params, tokenizer), rows, data, batch_size=2)
    prompt, completion = tokenize.make_encoder(tokenizer).encode_row("word " * 100, "Good.")
    start = [] if prompt[0] != tokenizer.bos_id else [tokenizer.bos_id]
    kept = np.concatenate([start, prompt[len(prompt) - 20 + len(start) :], completion]).astype(int)
    np.testing.assert_allclose(row["score"], naive(model, params, kept), rtol=1e-4)


def test_a_score_that_is_not_finite_is_a_rejection(exported):
    _, model, params, tokenizer = exported
    broken = params | {"scorer": {"weight": params["scorer"]["weight"] * jnp.inf}}
    (row,) = score_rows(RewardModel(model, broken, tokenizer), places(ROWS[:1]), DataConfig(), batch_size=2)
    assert isinstance(row, Rejection) and row.place == "x:1" and row.reason.startswith("its score is ")


def test_what_is_no_reward_model_is_refused(tmp_path):
    stack = contextlib.ExitStack()
    with pytest.raises(ConfigError, match=r"no reward model. Allowed: .* Choose another --model"):
        stack.enter_context(open_reward_model(str(TINY)))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="a run without a policy/ yet"):
        stack.enter_context(open_reward_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x", "text": "y"},
            r"x:1 has no field 'completion'\. Its fields are 'prompt', 'text'\. Set --prompt",
        ),
        ({"prompt": "x", "completion": "y", "score": 3}, r"x:1 has a field 'score' already\..*Set --score_field"),
    ],
)
def test_rows_without_the_fields_or_with_a_rating_already_are_refused(exported, row, message):
    _, model, params, tokenizer = exported
    with pytest.raises(ConfigError, match=message):
        list(score_rows(RewardModel(model, params, tokenizer), places([row]), DataConfig(), batch_size=2))


def test_ratings_of_a_configuration_are_not_overwritten(exported, tmp_path):
    rated = write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "A", "score": 2}])
    with pytest.raises(ConfigError, match=r"a.jsonl:1 has a field 'score' already"):
        list(completions_to_score(DataConfig(train=str(rated), format="scores"), "score"))
    # What is held out is not read.
    data = DataConfig(train=str(rated), eval=str(rated), format="scores")
    ((row, _),) = completions_to_score(data, "reward")
    assert row["score"] == 2.0


def test_a_run_is_scored_with_the_lengths_and_the_eos_that_it_trained_with(tmp_path):
    defaults = {"max_length": 1024, "max_prompt_length": 512, "eos_token": "auto"}
    assert settings_of_run(str(tmp_path)) == defaults
    shutil.copytree(ROOT / "configs" / "tiny_model", tmp_path / "policy")
    # As a run of before there was data.eos_token left it.
    (tmp_path / "config.json").write_text(json.dumps({"data": {"max_length": 99, "max_prompt_length": 11}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"eos_id": 0}}))
    token = tokenizers.Tokenizer.from_file(str(tmp_path / "policy" / "tokenizer.json")).id_to_token(0)
    for path in (tmp_path, tmp_path / "policy"):
        found = settings_of_run(str(path))
        assert found == {"max_length": 99, "max_prompt_length": 11, "eos_token": token} and token


def test_the_reward_of_a_completion_is_that_of_its_sequence(exported):
    run, model, params, tokenizer = exported
    prompts, completions = ["Name a film.", CHAT], ["Jaws.", "Fine."]
    with open_reward_model(str(run)) as opened:
        found = reward(opened, prompts, completions, batch_size=1)
    encoder = tokenize.make_encoder(tokenizer)
    pairs = [encoder.encode_row(*pair) for pair in zip(prompts, completions, strict=True)]
    np.testing.assert_allclose(found, [naive(model, params, np.concatenate(pair)) for pair in pairs], rtol=1e-4)


@pytest.mark.parametrize(
    ("completion", "reason"), [("", "empty completion"), ("long " * 2000, r"longer than data\.max_length\. A")]
)
def test_a_completion_without_a_reward_is_refused(exported, completion, reason):
    with pytest.raises(ConfigError, match=f"completion 2 cannot be scored: .*{reason}"):
        reward(RewardModel(*exported[1:]), ["x", "x"], ["fine", completion])


def test_each_batch_is_reported(exported):
    seen = []
    list(score_rows(RewardModel(*exported[1:]), places(ROWS), DataConfig(), batch_size=2, on_batch=seen.append))
    assert sum(seen) == 3 and max(seen) <= 2


def test_its_folder_is_a_reward_of_online_training(exported):
    run, model, params, tokenizer = exported
    prompts = ["Name a film.", CHAT]
    said = ["Jaws.", [{"role": "assistant", "content": "Fine."}]]
    scored = Scored(prompts, said, [(5,), (6,)], [True, True], {}, ["p:1", "p:2"])
    with open_rewards([f"{run} * 2"]) as rewards:
        sums, alone = total_rewards(rewards, scored, 60)
    encoder = tokenize.make_encoder(tokenizer)
    texts = [(prompts[0], "Jaws."), (CHAT, "Fine.")]
    expected = [naive(model, params, np.concatenate(encoder.encode_row(*each))) for each in texts]
    np.testing.assert_allclose(alone[str(run)], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums, 2 * np.array(expected), rtol=1e-4, atol=1e-5)
