"""The tiny tokenizer, prepared once, and indices made from rows."""

import concurrent.futures
import functools
import json

import pytest

from kto_jax.config import DataConfig
from kto_jax.data.index import builder
from kto_jax.data.index.index import build_index
from kto_jax.data.tokens import encoded_rows
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.tokenizer import make_encoder
from tests import TINY_MODEL


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Tiny tokenizer with its chat template."""
    return prepare_tokenizer(TINY_MODEL, tmp_path_factory.mktemp("chat") / "tokenizer", chat_template="auto")


class InProcessWorkers:
    """Stands in for `Workers` without starting processes, which would take seconds for each index."""

    def __init__(self, num_workers, start, tokenizer):
        encoded_rows._encoder = self.encoder(tokenizer)

    encoder = staticmethod(functools.lru_cache(make_encoder))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        encoded_rows._encoder = None

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


@pytest.fixture(scope="session")
def make_index(tmp_path_factory, tokenizer):
    """Builds an index of rows; keywords are fields of `DataConfig`. num_workers > 0 tokenizes in processes."""

    def make(rows, eval_rows=(), *, vocab_size=512, directory=None, num_workers=0, **fields):
        directory = directory or tmp_path_factory.mktemp("index")
        for name, content in (("train", rows), ("eval", eval_rows)):
            if content:
                path = directory / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in content))
                fields[name] = str(path)
        data = DataConfig(**{"num_workers": max(num_workers, 1), "holdout": 0.0, **fields})
        with pytest.MonkeyPatch.context() as patch:
            if not num_workers:
                patch.setattr(builder, "Workers", InProcessWorkers)
            return build_index(data, tokenizer, vocab_size=vocab_size, directory=directory / "indices")

    return make


def as_transformers(encoder):
    """The tokenizer of an encoder, as transformers opens it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(encoder.directory)
