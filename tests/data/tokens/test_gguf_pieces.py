"""Tokenizers of pieces with scores, to GGUF's fields and back."""

import json

import pytest
from tokenizers import Tokenizer

from kto_jax.data.tokens.gguf_pieces import describe_pieces, read_pieces
from tests.data.tokens.pieces import TEXTS, make_pieces


def to_fields(described):
    names = {"tokens": "tokens", "scores": "scores", "types": "token_type", "space_prefix": "add_space_prefix"}
    return {f"ggml.{theirs}": described[own] for own, theirs in names.items()} | {"ggml.unknown_token_id": 0}


@pytest.mark.parametrize("prefix", [True, False])
def test_the_tokenizer_comes_back_from_its_scores(prefix):
    definition = make_pieces(prefix=prefix)
    original, found = (
        Tokenizer.from_str(json.dumps(definition)),
        read_pieces(to_fields(describe_pieces(definition, 500))),
    )
    for text in (*TEXTS[:3], *TEXTS[4:]):
        ids = original.encode(text, add_special_tokens=False).ids
        assert found.encode(text).ids == ids
        assert found.decode(ids) == original.decode(ids) == text


def test_a_piece_scores_the_better_the_earlier_it_is_merged():
    definition = make_pieces(prefix=True)
    merges = [["▁", "a"], ["b", "c"], ["▁a", "bc"], ["▁ab", "c"]]
    tokens = ["<unk>", "<s>", "</s>", "<0x00>", "▁", "a", "b", "c", "▁a", "bc", "▁abc"]
    definition["model"] |= {"vocab": {token: place for place, token in enumerate(tokens)}, "merges": merges}
    described = describe_pieces(definition, 12)
    assert described["tokens"] == [*tokens, "[PAD11]"]
    assert described["scores"][8:11] == [0.0, -1.0, -2.0]
    assert set(described["scores"][:8]) == {-4.0}  # Not made by merges.
    assert described["types"] == [2, 3, 3, 6, *[1] * 7, 5]
    assert described["space_prefix"] is True


@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}},
    {"normalizer": {"type": "NFKC"}}, {"normalizer": None},
])  # fmt: skip
def test_other_ways_with_spaces_are_not_described(changes):
    assert describe_pieces(make_pieces(prefix=True) | changes, 500) is None


def test_a_piece_that_would_fill_the_memory_is_refused():
    fields = {"ggml.tokens": ["a" * 100_000], "ggml.scores": [0.0], "ggml.token_type": [1]}
    with pytest.raises(ValueError, match="it has a piece of 100000 characters; at most 256 are read"):
        read_pieces(fields)
