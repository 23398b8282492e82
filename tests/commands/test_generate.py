"""The command that completes prompts, end to end in processes of its own, on a tiny random model."""

import json
import os
import subprocess
import sys

import pytest

from kto_jax import generate
from kto_jax.config import ConfigError
from kto_jax.models.weights.load import read_config
from kto_jax.sampling import complete as complete_module
from kto_jax.sampling.complete import Completion, LanguageModel, complete
from kto_jax.sampling.sample import Sampling
from tests import COMPILER_FLAGS, ROOT
from tests.models.weights.test_adapter_folder import write_adapter
from tests.sampling.tiny import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run"))


def command(*arguments):
    """Runs the command on one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILER_FLAGS, "COLUMNS": "100"}
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
    opened = LanguageModel(model, tokenizer, lambda: params)
    expected = complete(opened, ["Say it.", chat, "Write a word."], Sampling(max_new_tokens=6), num_samples=2)
    assert [row["completion"] for row in rows] == [completion.text for completion in expected]
    assert [row["num_tokens"] for row in rows] == [completion.num_tokens for completion in expected]
    assert rows[0]["completion"] != rows[1]["completion"]


def test_every_adapter_completes_every_prompt_and_the_base_is_read_once(exported, tmp_path, capsys, monkeypatch):
    run, _, _, _ = exported
    config, reads = read_config(run / "policy"), []
    for name, alpha in (("short", 40), ("long", -40)):
        write_adapter(
            tmp_path / name, config, lora_alpha=alpha, base_model_name_or_path=str(run / "policy"),
            module="model.layers.{}.mlp.down_proj", shape=(config.embed_dim, config.mlp_dim),
        )  # fmt: skip
    read = complete_module.load_params
    monkeypatch.setattr(complete_module, "load_params", lambda *a, **b: reads.append(a) or read(*a, **b))
    options = generate.Options(
        model=str(run), adapter=(f"a={tmp_path / 'short'}", str(tmp_path / "long")), prompt=("Say it.", "Go."),
        max_new_tokens=5, temperature=0.0, json=True,
    )  # fmt: skip
    assert generate.generate(options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(reads) == 1
    assert [(row["adapter"], row["prompt"]) for row in rows] == [
        (name, prompt) for name in ("a", str(tmp_path / "long")) for prompt in ("Say it.", "Go.")
    ]
    for name, folder in (("a", "short"), (str(tmp_path / "long"), "long")):
        alone = complete(str(tmp_path / folder), ["Say it.", "Go."], Sampling(temperature=0.0, max_new_tokens=5))
        assert [row["completion"] for row in rows if row["adapter"] == name] == [one.text for one in alone]
    assert rows[0]["completion"] != rows[2]["completion"]


@pytest.mark.parametrize("adapters", [("a=x", "a=y"), ("=x",), ("a=",), ("x", "x")])
def test_adapters_without_a_name_or_with_the_same_are_refused(adapters):
    with pytest.raises(ConfigError, match=r"--adapter=.*NAME=FOLDER with different names. Set --adapter"):
        generate.generate(generate.Options(model="m", prompt=("x",), adapter=adapters))


def test_a_folder_without_adapters_is_refused(exported):
    run, _, _, _ = exported
    options = generate.Options(model=str(run), prompt=("x",), adapter=(f"a={run / 'policy'}",))
    with pytest.raises(ConfigError, match=r"policy holds no adapters: it has no adapter_config.json.*Set --adapter"):
        generate.generate(options)


def test_completions_are_shown_to_people_and_markup_in_them_is_text(capsys):
    chat = [{"role": "system", "content": "Be [red]brief."}, {"role": "user", "content": "Go."}]
    shown = [
        Completion("Say [bold]it[/bold].", "no [/nonsense] here", (3,) * 5, True),
        Completion("Say [bold]it[/bold].", "and so", (3,) * 7, False),
        Completion(chat, "gone", (3,) * 2, True),
    ]
    generate._print_pretty(shown, 1.25)
    printed = capsys.readouterr().out
    assert printed.count("Say [bold]it[/bold].") == 1
    assert "no [/nonsense] here\n" in printed
    assert "and so … (cut)" in printed
    assert "system: Be [red]brief.\nuser: Go." in printed
    assert "14 tokens in 1.2 s" in printed


def test_a_completion_cannot_steer_the_terminal(capsys):
    generate._print_pretty([Completion("a\x1b[2J", "b\x9b31m\x07", (3,) * 3, True)], 1.25)
    printed = capsys.readouterr().out
    assert r"a\x1b[2J" in printed and r"b\x9b31m\x07" in printed
    assert not set("\x1b\x9b\x07") & set(printed)


def test_an_unusable_command_is_refused_in_one_line_with_exit_code_2():
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
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2 is not .* Correct or remove the line"):
        generate.read_prompts(str(file))


def test_a_prompts_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        generate.read_prompts(str(tmp_path / "none.jsonl"))
