"""Secrets stay in the environment: none reaches a log, config.json, a report, a tracker or an error."""

import json

import pytest

from kto_jax.config import ConfigError, default_config, resolve
from kto_jax.train import main
from tests import ROOT, SAME_PROGRAMS

SECRETS = {
    "Hugging Face": "hf_" + "AbC9" * 9,
    "API key": "sk-" + "proj-4567" * 4,
    "GitHub": "ghp_" + "a1B2" * 9,
    "AWS": "AKIA" + "Q7W8E9R0" * 2,
    "password": "https://me:pass-w0rd@host/rows.jsonl",
    "signed": "https://host/rows.jsonl?X-Goog-Signature=0a1b2c",
    "key": "-----BEGIN RSA PRIVATE KEY-----",
}
PLACES = {
    "model.path": lambda config, secret: config.model.update(path=secret),
    "data.train": lambda config, secret: config.data.update(train=("rows.jsonl", secret)),
    "data.chat_template_kwargs.auth": lambda config, secret: config.data.update(chat_template_kwargs={"auth": secret}),
    "data.index_store": lambda config, secret: config.data.update(index_store=secret),
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_with_a_secret_is_refused_and_the_error_does_not_repeat_it(place, secret):
    config = default_config()
    config.model.path, config.data.train = "model", "rows.jsonl"
    PLACES[place](config, secret)
    with pytest.raises(ConfigError, match=rf"config\.{place} holds a.* environment alone") as refusal:
        resolve(config)
    assert secret not in str(refusal.value)


@pytest.mark.parametrize("flag", ["--config.model.path={}", "--workdir=gs://x?token={}", "--config.seed={}", "{}"])
def test_a_command_with_a_secret_is_refused_and_its_error_does_not_repeat_it(flag, capsys):
    secret = SECRETS["Hugging Face"]
    assert main(["--config=tiny", flag.format(secret)]) == 2
    written = capsys.readouterr()
    assert "argument 2 of the command line holds" in written.err
    assert secret not in written.err + written.out


@pytest.mark.parametrize("text", [
    "hf_internal/model", "org/name@0123456789012345678901234567890123456789", "gs://bucket/run", "task-sk-1", "a:b@c",
    "wheel:package==1.0/rows.csv", "https://host/rows.jsonl?download=true", "tfds:name:1.0.0", "C:/me@home/rows.jsonl",
])  # fmt: skip
def test_what_only_looks_like_a_secret_is_accepted(text):
    config = default_config()
    config.model.path, config.data.train = text, text
    assert resolve(config).model.path == text


def test_a_token_of_the_environment_reaches_no_file_and_no_log(tmp_path, monkeypatch, capfd):
    planted = {
        name: f"planted-{number:032d}" for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET"))
    }
    for name, secret in planted.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("KTO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    assert main(["--config=tiny", f"--workdir={run}", "--config.max_steps=1", *SAME_PROGRAMS]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "report.html", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    written = b"".join([path.read_bytes() for path in files]).decode("latin-1") + "".join(capfd.readouterr())
    assert not [name for name, secret in planted.items() if secret in written]
    assert json.loads((run / "config.json").read_text())["max_steps"] == 1
