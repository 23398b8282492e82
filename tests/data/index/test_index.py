import json
import shutil

import numpy as np
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.index import builder
from kto_jax.data.index import index as index_module
from kto_jax.data.index.index import build_index, open_index
from kto_jax.data.tokens.tokenizer import decode
from tests.data.conftest import TINY_MODEL

UNMAPPED = "label is not mapped: 'unknown'; --config.data.label_map=\"{'unknown': True}\" would make it desirable"


def toy_rows(num_prompts=40, completions=3):
    return [
        {"prompt": f"Question {i}?", "completion": f"Text {i} {j}.", "label": j % 2 == 0, "weight": 1 + j}
        for j in range(completions)
        for i in range(num_prompts)
    ]


@pytest.fixture(scope="module")
def index(make_index):
    return make_index(toy_rows(), holdout=0.25, judge_holdout=0.25)


def test_rows_are_in_source_order_with_their_labels_weights_and_places(index, tokenizer):
    rows = toy_rows()
    assert len(index.desirable) == len(rows) == 120
    for i in (0, 41, 119):
        assert decode(tokenizer, index.prompt(i)) == f"user\n{rows[i]['prompt']}\nassistant\n"
        assert decode(tokenizer, index.completion(i)) == rows[i]["completion"]
        assert index.completion(i)[-1] == tokenizer.eos_id and len(index.completion(i)) == index.completion_lengths[i]
        assert (bool(index.desirable[i]), float(index.weights[i])) == (rows[i]["label"], rows[i]["weight"])
        assert index.place(i).endswith(f"train.jsonl:{i + 1}")


def test_splits_are_disjoint_by_prompt_and_cover_all_rows(index):
    splits = {name: index.sequences(name) for name in ("train", "eval", "judge")}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(120))
    prompts = [set(index.prompt_hashes[rows].tolist()) for rows in splits.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 40
    assert all(3 < len(p) < 30 for p in prompts)


def test_the_split_of_a_prompt_does_not_depend_on_the_other_rows(index, make_index):
    part = make_index(toy_rows()[7:70], holdout=0.25, judge_holdout=0.25)
    whole = dict(zip(index.prompt_hashes.tolist(), index.splits.tolist(), strict=True))
    split = dict(zip(part.prompt_hashes.tolist(), part.splits.tolist(), strict=True))
    assert len(split) == 40 and all(whole[prompt] == code for prompt, code in split.items())


def test_the_manifest_counts_everything(make_index):
    rows = [
        {"prompt": "a", "completion": "b", "label": "good"},
        {"prompt": "a", "completion": "b", "label": "good"},
        {"prompt": "a", "completion": "b", "label": "bad"},
        {"prompt": "a", "completion": "c", "label": "bad"},
        {"prompt": "a", "completion": "d", "label": "other"},
        {"prompt": "a", "completion": "", "label": "good"},
        {"prompt": "a", "completion": "e", "label": "unknown"},
        {"prompt": "a", "completion": "long " * 50, "label": "good"},
    ]
    index = make_index(rows, label_map={"good": True, "bad": False, "other": None}, max_rejected=0.5, max_length=32)
    manifest = index.manifest
    counts = {"rows": 8, "accepted": 4, "skipped": 1, "rejected": 3}
    assert {name: manifest[name] for name in counts} == counts
    assert {name: manifest["sources"][0][name] for name in counts} == counts
    assert manifest["rejections"]["histogram"] == {
        "empty completion": 1,
        UNMAPPED: 1,
        "completion longer than data.max_length; data.long_completion='cut' keeps its beginning": 1,
    }
    places = {entry["place"].rpartition(":")[2]: entry["reason"] for entry in manifest["rejections"]["first"]}
    assert places == {
        "6": "empty completion",
        "7": UNMAPPED,
        "8": "completion longer than data.max_length; data.long_completion='cut' keeps its beginning",
    }
    assert manifest["splits"]["train"] == {"desirable": 2, "undesirable": 2, "prompts": 1}
    assert (manifest["duplicates"], manifest["contradictory"]) == (1, 1)
    assert manifest["lengths"]["completion"]["max"] == 2 and len(manifest["sources"][0]["sha256"]) == 64


def test_an_equal_call_reopens_the_index_and_a_different_one_builds_another(make_index, tmp_path, monkeypatch):
    first = make_index(toy_rows(), directory=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "Builder", None)  # building would fail
        again = make_index(toy_rows(), directory=tmp_path, num_workers=2, max_rejected=0.5)
    assert again.directory == first.directory and np.array_equal(again.tokens, first.tokens)
    keys = {first.manifest["key"]}
    for change in ({"max_length": 64}, {"holdout": 0.3}, {"label_map": {"True": True}}, {"vocab_size": 600}):
        keys.add(make_index(toy_rows(), directory=tmp_path, **change).manifest["key"])
    keys.add(make_index(toy_rows(39), directory=tmp_path).manifest["key"])
    assert len(keys) == 6
    assert not list((tmp_path / "indices").glob("building-*"))


def test_the_content_does_not_depend_on_how_many_workers_tokenize(make_index, monkeypatch):
    monkeypatch.setattr(builder, "_CHUNK", 16)
    one, two = (make_index(toy_rows(), num_workers=n, holdout=0.25) for n in (0, 2))
    assert one.manifest["content_sha256"] == two.manifest["content_sha256"]


def test_separate_held_out_feedback_is_never_trained_on(make_index):
    index = make_index(toy_rows(), [{"prompt": "New?", "completion": "Yes.", "label": True}], holdout=0.5)
    assert len(index.sequences("train")) == 120 and index.sequences("eval").tolist() == [120]
    assert index.place(120).endswith("eval.jsonl:1")
    overlap = [{"prompt": "Question 3?", "completion": "Text 3 1.", "label": True}]
    with pytest.raises(ConfigError, match=r"1 rows of data.eval .* also in data.train"):
        make_index(toy_rows(), overlap)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [{"prompt": "a", "completion": "", "label": True}] * 3,
            {"max_rejected": 1.0},
            r"0 of 3 rows usable.*3 × empty completion.*train.jsonl:1",
        ),
        (
            [*toy_rows(), {"prompt": "a", "label": True}],
            {},
            r"1 of 121 rows are rejected \(0.83%\).*train.jsonl:121: missing field 'completion'",
        ),
        (
            [{"prompt": "a", "completion": "b", "label": "x"}],
            {"label_map": {"x": None}},
            "0 of 1 rows usable.* Skipped: 1 × its label is mapped to None",
        ),
        (toy_rows(3), {"holdout": 1.0}, "9 are held out"),
        (toy_rows(3), {"vocab_size": 100, "max_rejected": 1.0}, "outside the model's vocabulary"),
        ([], {}, "data.train is empty"),
    ],
)
def test_feedback_that_cannot_be_trained_on_is_refused_and_leaves_nothing(make_index, tmp_path, rows, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_index(rows, directory=tmp_path, **fields)
    assert not [path for path in (tmp_path / "indices").iterdir() if path.name != "hub"]


def test_lowering_max_rejected_refuses_an_index_that_is_already_built(make_index, tmp_path):
    rows = [*toy_rows(), {"prompt": "a", "label": True}]
    make_index(rows, directory=tmp_path, max_rejected=0.01)
    with pytest.raises(ConfigError, match="1 of 121 rows are rejected"):
        make_index(rows, directory=tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "tokens.bin", "offsets.npy", "places.npy", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_damaged_index_is_refused_by_the_name_of_the_file(index, tmp_path, name, damage):
    shutil.copytree(index.directory, tmp_path / "copy")
    assert len(open_index(tmp_path / "copy").tokens) == len(index.tokens)
    path = tmp_path / "copy" / name
    break_file(path, damage)
    if (name, damage) == ("SHA256SUMS", "removed"):
        assert len(open_index(tmp_path / "copy").tokens) == len(index.tokens)  # as older versions wrote it
    else:
        named = "SHA256SUMS" if name == "SHA256SUMS" else f"damaged index: {name}"
        with pytest.raises(ConfigError, match=f"{named} .*Delete the folder to build it again"):
            open_index(tmp_path / "copy")


def break_file(path, damage):
    data = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 8 * 4])
    else:
        data[len(data) * 3 // 4] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "weights.npy"])
def test_an_index_of_a_version_without_sums_is_checked_by_the_digest_of_its_content(index, tmp_path, name):
    shutil.copytree(index.directory, tmp_path / "copy")
    (tmp_path / "copy" / "SHA256SUMS").unlink()
    break_file(tmp_path / "copy" / name, "flipped")
    with pytest.raises(ConfigError, match="its columns differ from content_sha256"):
        open_index(tmp_path / "copy")


@pytest.mark.parametrize(
    "name, damage", [("tokens.bin", "flipped"), ("manifest.json", "cut"), ("splits.npy", "removed")]
)
def test_a_damaged_index_in_the_cache_is_built_again_and_that_is_said(make_index, tmp_path, capsys, name, damage):
    first = make_index(toy_rows(), directory=tmp_path)
    tokens = np.array(first.tokens)
    capsys.readouterr()
    make_index(toy_rows(), directory=tmp_path)
    assert capsys.readouterr().err == ""
    break_file(first.directory / name, damage)
    again = make_index(toy_rows(), directory=tmp_path)
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("warning: ") and name in said and said.endswith("It is built again now.")
    np.testing.assert_array_equal(again.tokens, tokens)
    assert again.manifest["content_sha256"] == first.manifest["content_sha256"]
    assert not list((tmp_path / "indices").glob("building-*"))


def test_the_tiny_feedback_set_is_accepted_whole(tokenizer, tmp_path):
    data = DataConfig(train=str(TINY_MODEL.parent / "tiny_feedback.jsonl"), max_length=128, num_workers=1, holdout=0.1)
    index = build_index(data, tokenizer, vocab_size=512, directory=tmp_path)
    assert index.manifest["accepted"] == 240 and not index.manifest["contradictory"]
    assert len(index.sequences("eval")) and json.dumps(index.manifest)


def test_a_hub_set_that_was_fetched_is_read_without_the_hub(make_index, tmp_path, monkeypatch):
    fetched = tmp_path / "indices" / "hub" / "org--name--train.jsonl"
    fetched.parent.mkdir(parents=True)
    fetched.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(4)))
    monkeypatch.setattr(index_module, "pinned", None)  # to ask the Hub would fail
    index = make_index([], directory=tmp_path, train="hub:org/name/train")
    assert len(index.sequences("train")) == 12 and index.place(3) == "hub:org/name/train:4"
