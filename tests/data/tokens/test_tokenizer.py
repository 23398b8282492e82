"""Prompts are encoded in a worker."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest

from kto_jax.config import ConfigError
from kto_jax.data.tokens.tokenizer import decode, encode_prompts, kept_encoder
from tests.data.conftest import TINY_MODEL


def test_prompts_are_encoded_in_a_worker_and_the_caller_never_imports_transformers(tokenizer, encoder, tmp_path):
    # The caller has no `if __name__ == "__main__"`: spawned workers must not run it again.
    program = f"""
import sys
from pathlib import Path
from kto_jax.data.tokens.tokenizer import TokenizerInfo, encode_prompts, decode
info = TokenizerInfo(Path({str(tokenizer.directory)!r}), 512, 0, 2, (2,), "", True)
ids, = encode_prompts(info, ["Hello?"])
print(ids.tolist(), repr(decode(info, ids)))
print([name for name in ("transformers", "torch", "jax") if name in sys.modules])
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PYTHONPATH": str(TINY_MODEL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    first, second = done.stdout.splitlines()
    expected = encoder.encode_prompt("Hello?")
    assert first == f"{expected.tolist()} {decode(tokenizer, expected)!r}" and second == "[]"


def test_a_prompt_that_cannot_be_encoded_is_refused_by_its_number(tokenizer):
    without = dataclasses.replace(tokenizer, has_chat_template=False)
    with pytest.raises(ConfigError, match="prompt 2 cannot be encoded"):
        encode_prompts(without, ["Hello?", [{"role": "user", "content": "x"}]])


def test_the_encoder_that_was_made_last_is_used_again_for_the_same_tokenizer_elsewhere(tokenizer, tmp_path):
    elsewhere = dataclasses.replace(tokenizer, directory=shutil.copytree(tokenizer.directory, tmp_path / "other"))
    encoder = kept_encoder(tokenizer)
    assert kept_encoder(elsewhere) is encoder
    assert kept_encoder(dataclasses.replace(tokenizer, has_chat_template=False)) is not encoder
    other = dataclasses.replace(tokenizer, rendering=dataclasses.replace(tokenizer.rendering, fold_system=True))
    assert kept_encoder(other) is not kept_encoder(tokenizer)
