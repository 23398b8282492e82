"""The command that completes prompts, end to end in processes of its own, on a tiny random model."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kto_jax import generate
from kto_jax.config import CheckpointConfig, ConfigError
from kto_jax.data.tokens import tokenizer as tokenize
from kto_jax.models.families.config_json import write_config_json
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import read_config
from kto_jax.training.checkpoints import Checkpoints
from kto_jax.training.run_folder import write_json
from tests import ROOT

TINY = ROOT / "configs" / "tiny_model"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run's folder with a policy as training exports it, and its model, parameters and tokenizer."""
    run = tmp_path_factory.mktemp("run")
    model = Model.create(read_config(TINY))
    params = model.init_params(jax.random.key(0), "float32")
    tokenizer = tokenize.prepare_tokenizer(TINY, run / "tokenizer", chat_template="auto")
    save_hugging_face(run / "policy", model, params, tokenizer_dir=tokenizer.directory, model_card="tiny")
    return run, model, params, tokenizer


def command(*arguments):
    """Runs the command on one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "kto_jax.generate", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_prompts_of_the_command_line_and_of_a_file_are_completed_as_json(exported, tmp_path):
    run, model, params, tokenizer = exported
    chat = [{"role": "user", "content": "How are you?"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": chat}) + "\n\n" + json.dumps({"prompt": "Write a word.", "id": 3}) + "\n")
    found = command(
        f"--model={run}", "--prompt=Say it.", f"--prompts={file}", "--max_new_tokens=6", "--num_samples=2", "--json"
    )
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == [p for p in ("Say it.", chat, "Write a word.") for _ in range(2)]
    expected = generate.complete(
        model, params, tokenizer, ["Say it.", chat, "Write a word."], num_samples=2, seed=0,
        max_new_tokens=6, temperature=1.0, top_p=1.0, top_k=0, batch_size=16,
    )  # fmt: skip
    assert [row["completion"] for row in rows] == [completion.text for completion in expected]
    assert [row["num_tokens"] for row in rows] == [completion.num_tokens for completion in expected]
    assert rows[0]["completion"] != rows[1]["completion"]


def test_completions_are_shown_to_people_and_markup_in_them_is_text(capsys):
    chat = [{"role": "system", "content": "Be [red]brief."}, {"role": "user", "content": "Go."}]
    shown = [
        generate.Completion("Say [bold]it[/bold].", "no [/nonsense] here", 5, True),
        generate.Completion("Say [bold]it[/bold].", "and so", 7, False),
        generate.Completion(chat, "gone", 2, True),
    ]
    generate._print_pretty(shown, 1.25)
    printed = capsys.readouterr().out
    assert printed.count("Say [bold]it[/bold].") == 1
    assert "no [/nonsense] here\n" in printed
    assert "and so … (cut)" in printed
    assert "system: Be [red]brief.\nuser: Go." in printed
    assert "14 tokens in 1.2 s" in printed


def test_what_cannot_be_done_is_one_line_and_exit_code_2():
    found = command("--model=does/not/exist/at/all", "--prompt=x")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: does/not/exist/at/all does not exist")
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("model, prompts", [("", ["x"]), ("model", []), ("model", ["x", " "])])
def test_a_command_without_a_model_or_prompts_is_refused(model, prompts):
    with pytest.raises(ConfigError, match="a model and at least one prompt"):
        generate.generate(generate.Options(model=model, prompt=tuple(prompts)))


@pytest.mark.parametrize(
    "line", ['{"prompt": ""}', '{"text": "x"}', "[1]", "{", '{"prompt": [{"role": "user"}]}', '{"prompt": []}']
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2 is not .* Mend or remove the line"):
        generate.read_prompts(str(file))


def test_a_prompts_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        generate.read_prompts(str(tmp_path / "none.jsonl"))


def test_no_samples_are_refused_before_anything_is_encoded():
    with pytest.raises(ConfigError, match="num_samples=0"):
        generate.complete(None, None, None, ["x"], num_samples=0, seed=0)


def test_a_completion_that_ends_says_so_and_every_eos_of_the_model_ends_it(exported, monkeypatch):
    _, model, params, tokenizer = exported
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=(7, 9)))
    tokenizer = dataclasses.replace(tokenizer, stop_ids=(tokenizer.eos_id, 11))
    asked = {}

    def sample(model, params, prompts, **arguments):
        asked.update(arguments)
        return [np.asarray([5, 7]), np.asarray([5, tokenizer.eos_id]), np.asarray([7, 5])]

    monkeypatch.setattr(generate.rollout, "sample", sample)
    found = generate.complete(model, params, tokenizer, ["Say it."], num_samples=3, seed=0, batch_size=16)
    assert [completion.ended for completion in found] == [True, True, False]
    assert asked["eos_id"] == sorted({7, 9, 11, tokenizer.eos_id})
    assert asked["batch_size"] == 3


def test_a_runs_newest_checkpoint_is_taken_until_its_policy_is_exported(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    asked = []

    def load_policy(workdir, *, dtype):
        asked.append((workdir, dtype))
        return "model", "params", workdir / "tokenizer"

    monkeypatch.setattr(generate.checkpoint, "load_policy", load_policy)
    assert generate.open_model(str(tmp_path), dtype="bfloat16") == ("model", "params", tmp_path / "tokenizer")
    assert asked == [(tmp_path, "bfloat16")]


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
    model = Model.create(read_config(TINY), scorer="reward")
    params = model.init_params(jax.random.key(0), "float32")
    save_checkpoint(tmp_path, params)
    refusal = r"a reward model, which .* language model is needed here\. Choose .* python -m kto_jax\.score"
    with pytest.raises(ConfigError, match=refusal):
        generate.open_model(str(tmp_path), dtype="float32")
    save_hugging_face(tmp_path / "policy", model, params, tokenizer_dir=None, model_card="")
    (tmp_path / "policy" / "model.safetensors").unlink()
    for path in (tmp_path, tmp_path / "policy"):
        with pytest.raises(ConfigError, match=refusal):
            generate.open_model(str(path), dtype="float32")


def test_a_policy_with_a_value_scorer_writes_as_it_would_without(exported, tmp_path):
    _, model, params, tokenizer = exported
    scored = Model.create(model.config, scorer="value").init_params(jax.random.key(0), "float32")["scorer"]
    save_checkpoint(tmp_path, params | {"scorer": scored})
    opened, loaded, _ = generate.open_model(str(tmp_path), dtype="float32")
    assert "scorer" in loaded
    write = functools.partial(
        generate.complete, tokenizer=tokenizer, prompts=["Say it."], num_samples=1, seed=0, max_new_tokens=6,
        temperature=1.0, top_p=1.0, top_k=0, batch_size=1,
    )  # fmt: skip
    assert write(opened, loaded) == write(model, params)


def test_a_completion_prefix_is_read_after_the_prompt_as_training_reads_a_control(exported, monkeypatch):
    _, model, params, tokenizer = exported
    seen = []

    def sample(model, params, prompts, **options):
        seen.extend(prompts)
        return [np.array([5], np.int32) for _ in prompts]

    monkeypatch.setattr(generate.rollout, "sample", sample)
    for prefix in ("", "<|good|>"):
        generate.complete(
            model, params, tokenizer, ["Say it."], num_samples=1, seed=0, completion_prefix=prefix, batch_size=1
        )
    control = tokenize.encode_text(tokenizer, "<|good|>")
    assert len(control) > 0
    np.testing.assert_array_equal(seen[1], np.concatenate([seen[0], control]))
