"""Feedback that holds its token ids: nothing is encoded, cut or ended again."""

import numpy as np
import pytest

from kto_jax.config import ConfigError
from kto_jax.data.batches.packing import RowLimits
from kto_jax.data.batches.schedule import Order, Schedule
from kto_jax.data.index.index import open_index
from kto_jax.shapes import SAMPLED

FIGURES = {"old_logps": 0.25, "reference_logps": 0.5, "advantages": -1.0, "values": 2.0, "returns": 3.0}


def scored(number, count, **changes):
    """A row whose text does not encode to its ids, and which is cut: no EOS."""
    ids = list(range(20 + number, 20 + number + count))
    figures = {name: [value + number + token for token in range(count)] for name, value in FIGURES.items()}
    row = {"type": "scalar_feedback", "prompt": f"p{number}", "output": "\x00 other text", "reward": number - 1.5}
    return row | {"prompt_ids": [1, 3 + number], "output_ids": ids} | figures | changes


@pytest.fixture(scope="module")
def index(make_index):
    rows = [scored(number, 2 + number) for number in range(4)]
    return make_index(rows, format="scores", layout="halos", sampled_tokens=True, max_length=24, max_prompt_length=23)


def test_the_index_holds_exactly_the_sampled_ids(index):
    assert [index.prompt(row).tolist() for row in range(4)] == [[1, 3], [1, 4], [1, 5], [1, 6]]
    assert index.completion(2).tolist() == [22, 23, 24, 25]
    assert len(set(index.prompt_hashes.tolist())) == 4
    np.testing.assert_array_equal(index.sampled_figures(1), [[v + 1 + t for v in FIGURES.values()] for t in range(3)])
    assert open_index(index.directory).sampled.shape == (len(index.tokens), len(SAMPLED))
    assert tuple(FIGURES) == SAMPLED


def test_a_batch_has_each_tokens_figures_at_the_token(index):
    limits = RowLimits((24,), completion_length=16, microbatch_rows=2, max_length=24)
    schedule = Schedule(index, np.arange(4), Order(4, seed=1), limits, unmatched=False, reads_sampled=True)
    batch = schedule.batch(0)
    targets, segments = batch.matched.targets, batch.matched.target_segments
    assert (segments > 0).sum() == 2 + 3 + 4 + 5
    seen = set()
    for place in zip(*np.nonzero(segments), strict=True):
        slot = (*place[:2], segments[place] - 1)
        number = round(float(batch.scores[slot]) + 1.5)
        token = targets[place] - 20 - number
        assert batch.sampled.old_logps[place] == 0.25 + number + token
        assert batch.sampled.returns[place] == 3.0 + number + token
        seen.add((number, int(token)))
    assert len(seen) == 14 and not batch.sampled.values[segments == 0].any()
    half = schedule.batch(0, slice(1, 2))
    np.testing.assert_array_equal(half.sampled.advantages, batch.sampled.advantages[:, 1:2])


def test_thumbs_and_pairs_hold_ids_too(make_index):
    own = {"prompt": "p", "prompt_ids": [1, 2]}
    thumb = {"type": "binary_feedback", "output": "", "output_ids": [9], "label": 1, **own}
    index = make_index([thumb], layout="halos", sampled_tokens=True)
    assert index.completion(0).tolist() == [9] and bool(index.desirable[0])
    pair = {"type": "pairwise_feedback", "output_A": "a", "output_A_ids": [9], "output_B": "b", "output_B_ids": [8, 7]}
    index = make_index([{**pair, "label": 0, **own}], format="pairs", layout="halos", sampled_tokens=True)
    assert [index.completion(row).tolist() for row in (0, 1)] == [[8, 7], [9]] and index.rejected[0] == 1


def test_without_the_setting_the_text_is_read(make_index, tokenizer):
    row = scored(1, 2, output="Yes.")
    index = make_index([row], format="scores", layout="halos")
    assert index.completion(0)[-1] == tokenizer.eos_id and index.sampled is None
    assert not (index.directory / "sampled.bin").exists()


@pytest.mark.parametrize("change, reason", [
    ({"output_ids": None}, "missing field 'output_ids', which data.sampled_tokens reads"),
    ({"prompt_ids": []}, "prompt_ids is not a list of token ids: '[]'"),
    ({"output_ids": [1, "a"]}, "output_ids is not a list of token ids"),
    ({"old_logps": [1.0]}, "old_logps is not a list of 2 finite numbers, one for each id"),
    ({"values": [1.0, "x"]}, "values is not a list of 2 finite numbers"),
    ({"output_ids": [600, 1]}, "outside the model's vocabulary"),
    ({"prompt_ids": [1] * 30}, "sampled tokens are more than data.max_length, and none may be cut"),
])  # fmt: skip
def test_a_row_whose_tokens_cannot_be_used_is_rejected(make_index, change, reason):
    rows = [scored(0, 2), scored(1, 2, **change)]
    index = make_index(
        rows, format="scores", layout="halos", sampled_tokens=True, max_length=24, max_prompt_length=23, max_rejected=1
    )
    (found,) = index.manifest["rejections"]["histogram"]
    assert reason in found and index.manifest["accepted"] == 1


def test_every_row_rejected_is_an_error(make_index):
    with pytest.raises(ConfigError, match="output_ids"):
        make_index([scored(0, 2, output_ids=None)], format="scores", layout="halos", sampled_tokens=True)
