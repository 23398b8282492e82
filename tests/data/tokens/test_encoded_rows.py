"""Rows as ids: what is cut, what is rejected, and hashes of the whole."""

import numpy as np
import pytest

from kto_jax.data.rows.records import Feedback
from kto_jax.data.tokens import encoded_rows
from kto_jax.data.tokens.encoded_rows import Limits, encode_feedback
from kto_jax.data.truncation import cut_prompt, fit_lengths
from tests.data.tokens.chat_models import EOS


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((5, 3), (5, 3)), ((9, 3), (4, 3)), ((9, 6), (2, 6)), ((9, 9), (1, 7)), ((1, 8), (1, 7)), ((5, 4), (4, 4))],
)
def test_the_prompt_is_cut_first_and_the_completion_last(lengths, kept):
    assert tuple(map(int, fit_lengths(*lengths, max_length=8, max_prompt_length=4))) == kept


def test_a_prompt_is_cut_from_the_left_and_keeps_its_bos():
    ids = np.array([7, 1, 2, 3, 4])
    assert cut_prompt(ids, 3, None).tolist() == [2, 3, 4]
    assert cut_prompt(ids, 3, 7).tolist() == [7, 3, 4]
    assert cut_prompt(ids, 3, 9).tolist() == [2, 3, 4]
    assert cut_prompt(ids, 1, 7).tolist() == [4]
    assert cut_prompt(ids, 5, 7) is ids


def encode(monkeypatch, encoder, prompt, completion, **limits):
    monkeypatch.setattr(encoded_rows, "_encoder", encoder)
    limits = {"max_length": 64, "max_prompt_length": 32, "long_completion": "reject", "vocab_size": 512, **limits}
    return encode_feedback([Feedback(prompt, completion, True, 1.0, "a:1")], Limits(**limits))


def test_a_long_completion_is_rejected_or_cut_without_eos(monkeypatch, encoder):
    rows = encode(monkeypatch, encoder, "Hello?", "x " * 200)
    assert rows.reasons == [
        "completion longer than data.max_length; data.long_completion='cut' keeps its beginning"
    ] and not len(rows.tokens)
    rows = encode(monkeypatch, encoder, "Hello?", "x " * 200, long_completion="cut")
    assert rows.reasons == [None] and len(rows.tokens) == 64 and EOS not in rows.tokens[rows.prompt_lengths[0] :]
    assert rows.prompt_lengths[0] == len(encoder.encode_prompt("Hello?"))


def test_a_long_prompt_is_stored_up_to_max_length_and_its_hash_is_of_the_whole(monkeypatch, encoder):
    long, other = (encode(monkeypatch, encoder, start + "y " * 200, "z") for start in ("a", "b"))
    assert long.prompt_lengths[0] == 63 and long.reasons == [None]
    assert np.array_equal(long.tokens[-20:], other.tokens[-20:]) and long.prompt_hashes != other.prompt_hashes


def test_an_id_outside_the_models_vocabulary_is_rejected_with_its_token(monkeypatch, encoder):
    largest = int(encoder.encode_row("Hello?", "Hi.")[0].max())
    rows = encode(monkeypatch, encoder, "Hello?", "Hi.", vocab_size=largest)
    assert f"token {encoder.token(largest)!r} ({largest}) is outside the model's vocabulary" == rows.reasons[0]


def test_a_row_that_cannot_be_encoded_costs_only_itself(monkeypatch, plain):
    monkeypatch.setattr(encoded_rows, "_encoder", plain)
    rows = [Feedback(p, "Hi.", True, 1.0, "a:1") for p in ("a", [{"role": "user", "content": "x"}], "b")]
    encoded = encode_feedback(rows, Limits(64, 32, "reject", 512))
    assert encoded.reasons == [None, "chat messages need a chat template; data.chat_template names a file", None]
    assert len(encoded.tokens) == encoded.prompt_lengths.sum() + encoded.completion_lengths.sum()
    assert len(encoded.prompt_hashes) == len(encoded.pair_hashes) == 2
