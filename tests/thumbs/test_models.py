"""Models of this machine: a stream is what `complete` draws, several take turns, and long conversations are refused."""

import contextlib
import itertools
import json

import pytest

from kto_jax.config import ConfigError
from kto_jax.sampling.complete import LanguageModel, complete
from kto_jax.sampling.sample import Sampling
from kto_jax.thumbs.models import Device, LocalModel, Settings, reference_of
from tests.sampling.tiny import export

ASKED = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    _, model, params, tokenizer = export(tmp_path_factory.mktemp("run"))
    with contextlib.closing(Device()) as device:
        # `decoding_params` empties the parameters that it is given.
        yield LanguageModel(model, tokenizer, lambda: dict(params)), device


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_complete_draws(opened, temperature):
    model, device = opened
    (whole,) = complete(model, [ASKED], Sampling(temperature, max_new_tokens=11), seed=3)
    local = LocalModel("tiny", model, device)
    pieces = list(local.stream(ASKED, Settings(temperature, 11), 3))
    assert pieces[-1].text == whole.text and pieces[-1].num_tokens == whole.num_tokens
    assert pieces[-1].ended == whole.ended
    counts = [piece.num_tokens for piece in pieces]
    assert counts[0] == 1 and all(0 < after - before <= 4 for before, after in itertools.pairwise(counts))


def test_streams_take_turns(opened):
    model, device = opened
    local = LocalModel("tiny", model, device)
    streams = [local.stream(ASKED, Settings(1.0, 9), seed) for seed in range(3)]
    mixed = {number: list() for number in range(3)}
    for _ in range(20):
        for number, stream in enumerate(streams):
            if (piece := next(stream, None)) is not None:
                mixed[number].append(piece)
    for seed in range(3):
        assert mixed[seed][-1] == list(local.stream(ASKED, Settings(1.0, 9), seed))[-1]


def test_a_conversation_that_is_too_long_is_refused(opened):
    model, device = opened
    context = model.model.config.max_length
    with pytest.raises(ConfigError, match=f"would exceed the model's context of {context}"):
        next(LocalModel("tiny", model, device).stream(ASKED, Settings(1.0, context), 0))


def test_the_reference_is_what_a_run_started_from(tmp_path):
    def write(**sections):
        reference = {"path": "", "base": ""}
        config = {"model": {"path": "org/base", "base": "", "init": "pretrained"}, "reference": reference, **sections}
        (tmp_path / "config.json").write_text(json.dumps(config))

    assert reference_of(str(tmp_path)) == ""
    write()
    assert reference_of(str(tmp_path)) == reference_of(str(tmp_path / "policy")) == "org/base"
    write(reference={"path": "org/other", "base": ""})
    assert reference_of(str(tmp_path)) == "org/other"
    write(model={"path": "x", "base": "", "init": "random"})
    with pytest.raises(ConfigError, match="random weights, which it did not keep"):
        reference_of(str(tmp_path))
    write(model={"path": "x", "base": "org/base", "init": "pretrained"})
    with pytest.raises(ConfigError, match="adapters on org/base"):
        reference_of(str(tmp_path))
