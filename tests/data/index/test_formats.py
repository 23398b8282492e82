"""Every format from a file on disk to the index."""

import json

import numpy as np
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import Feedback, Preference, Rejection, Skipped, read_records
from kto_jax.data.tokens.tokenizer import decode

PAIR = {"prompt": "Hello?", "chosen": "Hi.", "rejected": "Go."}
SCORED = {"prompt": "Hello?", "completion": "Hi.", "score": 0.5}


def read(path, kind, *rows, **fields):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(str(path), DataConfig(format=kind, **fields)))


def texts(index, tokenizer):
    return [decode(tokenizer, index.completion(i)) for i in range(len(index.desirable))]


def test_a_pair_becomes_two_completions_of_one_prompt(tmp_path):
    row = {"prompt": [{"role": "user", "content": "Hello?"}], "chosen": [{"role": "assistant", "content": "Hi."}]}
    first, second = read(tmp_path / "a.jsonl", "pairs", {**PAIR, "weight": 2}, {**row, "rejected": "Go."})
    place = f"{tmp_path / 'a.jsonl'}:1"
    assert first == Preference(
        Feedback("Hello?", "Hi.", True, 2.0, place), Feedback("Hello?", "Go.", False, 2.0, place)
    )
    assert first.place == place
    assert (second.chosen.prompt, second.chosen.completion) == (row["prompt"], "Hi.")
    assert second.rejected.prompt == row["prompt"] and second.place.endswith(":2")


def test_a_score_is_a_number_or_text_that_is_one(tmp_path):
    scores = [0.5, 3, "-1e2", 0, -0.25]
    records = read(tmp_path / "a.jsonl", "scores", *({**SCORED, "score": score} for score in scores))
    assert [record.score for record in records] == [0.5, 3.0, -100.0, 0.0, -0.25]
    assert all(isinstance(record, Feedback) for record in records)
    (tmp_path / "b.csv").write_text("prompt,completion,stars\nHello?,Hi.,4.5\n")
    (record,) = list(read_records(str(tmp_path / "b.csv"), DataConfig(format="scores", score_field="stars")))
    assert record.score == 4.5


def test_a_demonstration_is_desirable_and_needs_no_label(tmp_path):
    rows = {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, {"prompt": "a", "completion": ""}
    first, second = read(tmp_path / "a.jsonl", "demonstrations", *rows)
    assert first == Feedback("a", "b", True, 1.0, f"{tmp_path / 'a.jsonl'}:1", 0.0)
    assert second == Rejection("empty completion", f"{tmp_path / 'a.jsonl'}:2")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("pairs", {"chosen": "Go."}, "chosen and rejected are the same"),
        ("pairs", {"chosen": [{"role": "assistant", "content": "Go."}]}, "chosen and rejected are the same"),
        ("pairs", {"chosen": None}, "null field 'chosen'"),
        ("pairs", {"rejected": " "}, "empty rejected"),
        ("pairs", {"rejected": 3}, "rejected is not text but a number"),
        ("pairs", {"chosen": []}, "empty chosen"),
        ("pairs", {"chosen": [{"role": "user", "content": "x"}]}, "chosen has role 'user', not 'assistant'"),
        ("pairs", {"rejected": [{"role": "assistant", "content": "x"}] * 2}, "rejected is not one message"),
        ("pairs", {"rejected": "a\0b"}, "NUL character in rejected"),
        ("pairs", {"weight": -1}, "weight is not a finite number of at least 0: '-1'"),
        ("pairs", {"weight": 1e39}, "weight is not a finite number of at least 0: '1e+39'"),
        ("scores", {"score": float("-inf")}, "score is not a finite number: '-inf'"),
        ("scores", {"score": 1e39}, "score is not a finite number: '1e+39'"),
        ("scores", {"score": 10**400}, "score is not a finite number: '" + "1" + "0" * 39 + "'"),
        ("scores", {"score": True}, "score is not a finite number: 'True'"),
        ("scores", {"score": "high"}, "score is not a finite number: 'high'"),
        ("scores", {"score": [1, 2]}, "score is not a finite number: '[1, 2]'"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason_and_costs_only_itself(tmp_path, kind, change, reason):
    good = PAIR if kind == "pairs" else SCORED
    first, bad, last = read(tmp_path / "a.jsonl", kind, good, {**good, **change}, good)
    assert bad == Rejection(reason, f"{tmp_path / 'a.jsonl'}:2")
    assert not isinstance(first, Rejection) and not isinstance(last, Rejection)


@pytest.mark.parametrize("score", [None, "", float("nan")])
def test_a_row_without_a_score_is_skipped_or_rejected(tmp_path, score):
    path = tmp_path / "a.jsonl"
    reason = ("no value in the field 'score'", f"{path}:2")
    assert read(path, "scores", SCORED, {**SCORED, "score": score})[1] == Skipped(*reason)
    assert read(path, "scores", SCORED, {**SCORED, "score": score}, unlabelled="reject")[1] == Rejection(*reason)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "pairs",
            {"prompt": "a", "chosen": "b", "rejectd": "c"},
            r"no column 'rejected'.*mean 'rejectd'\? Set config.data.prompt_field \(or prompt_template\), chosen_field "
            r"and rejected_field; or config.data.format, which is 'pairs'",
        ),
        ("pairs", SCORED, r"no column 'chosen'.*config.data.format"),
        (
            "scores",
            {"prompt": "a", "completion": "b", "scores": 1},
            r"mean 'scores'\? .*completion_field and score_field",
        ),
        (
            "demonstrations",
            {"prompt": "a", "completions": "b"},
            r"'completions'\? .*template\) and completion_field; or",
        ),
        ("thumbs", PAIR, r"no column 'completion'.*completion_field and label_field; or .* is 'thumbs'"),
    ],
)
def test_a_file_that_lacks_a_column_of_the_format_is_refused(tmp_path, kind, row, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "a.jsonl", kind, row)


def pair_rows(count):
    return [{"prompt": f"Question {i // 2}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."} for i in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_index_of_pairs_holds_chosen_and_rejected_side_by_side(make_index, tokenizer, num_workers):
    rows = [*pair_rows(30), {**PAIR, "chosen": "long " * 60}, {**PAIR, "rejected": "long " * 60}, PAIR]
    index = make_index(rows, format="pairs", max_length=32, max_rejected=0.5, holdout=0.4, num_workers=num_workers)
    expected = [text for i in range(30) for text in (f"Good {i}.", f"Bad {i}.")]
    assert texts(index, tokenizer) == [*expected, "Hi.", "Go."]
    assert index.desirable.tolist() == [True, False] * 31
    assert index.rejected.tolist() == [row + 1 if row % 2 == 0 else -1 for row in range(62)]
    assert (index.prompt_hashes[::2] == index.prompt_hashes[1::2]).all()
    assert (index.splits[::2] == index.splits[1::2]).all() and index.place(61).endswith(":33")
    pairs = {name: index.pairs(name) for name in ("train", "eval")}
    assert sorted(np.concatenate(list(pairs.values()))) == list(range(0, 62, 2)) and min(map(len, pairs.values())) > 3
    assert all((index.splits[rows] == code).all() for code, rows in enumerate(pairs.values()))
    manifest = index.manifest
    assert {n: manifest[n] for n in ("rows", "accepted", "rejected", "unused")} == {
        **{"rows": 33, "accepted": 31, "rejected": 2, "unused": 0}
    }
    assert manifest["rejections"]["histogram"] == {
        "completion longer than data.max_length; data.long_completion='cut' keeps its beginning": 2
    }
    assert manifest["pairs"] == {**{n: len(rows) for n, rows in pairs.items()}, "judge": 0, "unused": 0}


def test_completions_that_are_the_same_once_they_are_cut_are_no_pair(make_index):
    rows = [PAIR, {**PAIR, "chosen": "long " * 60, "rejected": "long " * 70}]
    index = make_index(rows, format="pairs", max_length=32, max_rejected=0.5, long_completion="cut")
    assert index.manifest["rejections"]["histogram"] == {"chosen and rejected are the same": 1}
    assert len(index.desirable) == 2


def test_an_index_of_scores_has_labels_by_the_rule_and_pairs_within_prompts(make_index):
    rows = [{**SCORED, "prompt": f"Question {i % 4}?", "completion": f"Text {i}.", "score": i / 10} for i in range(20)]
    index = make_index(rows, format="scores", score_threshold=0.7)
    assert index.desirable.tolist() == [i >= 7 for i in range(20)]
    assert index.scores.dtype == np.float32 and np.allclose(index.scores, np.arange(20) / 10)
    (scores,) = index.manifest["scores"]
    assert scores == {
        "sources": [index.manifest["data"]["train"]],
        **{"rule": "threshold", "pivot": 0.7, "min": 0.0, "mean": pytest.approx(0.95), "max": 1.9, "unused": 0},
    }
    chosen = index.pairs("train")
    partners = index.rejected[chosen]
    assert len(chosen) == 7 == index.manifest["pairs"]["train"]
    assert (partners < 7).all() and (chosen % 4 == partners % 4).all() and len(set(partners)) == 7
    other = make_index(rows, format="scores", score_threshold=0.7, seed=1)
    assert other.manifest["key"] != index.manifest["key"] and not np.array_equal(other.rejected, index.rejected)


@pytest.mark.parametrize(
    ("rule", "pivot"), [("mean", 1.0), ("median", 1.0), ("prompt_mean", None), ("bernoulli", None)]
)
def test_scores_that_give_no_label_are_unused_and_counted(make_index, rule, pivot):
    rows = [{**SCORED, "completion": f"Text {i}.", "score": i % 3} for i in range(12)]
    index = make_index(rows, format="scores", score_rule=rule)
    unused = 0 if rule == "bernoulli" else 4
    assert [(scores["pivot"], scores["unused"]) for scores in index.manifest["scores"]] == [(pivot, unused)]
    assert index.manifest["unused"] == len(index.sequences("unused")) == unused
    assert not len(set(index.sequences("unused")) - {1, 4, 7, 10})
    assert len(index.sequences("train")) == 12 - unused and index.manifest["accepted"] == 12
    train = index.manifest["splits"]["train"]
    assert train["desirable"] + train["undesirable"] == 12 - unused


def test_scores_that_all_tie_leave_nothing_to_train_on(make_index):
    with pytest.raises(ConfigError, match=r"0 of 3 rows usable.* 3 are left out by data.score_rule"):
        make_index([SCORED] * 3, format="scores", score_rule="median")


def test_thumbs_are_matched_within_their_prompt(make_index):
    rows = [
        {"prompt": f"Question {i % 5}?", "completion": f"Text {i}.", "label": bool(i % 3), "weight": 1}
        for i in range(30)
    ]
    index = make_index(rows, holdout=0.3)
    expected = sum(
        min(sum(bool(i % 3) for i in group), sum(not i % 3 for i in group))
        for group in (range(p, 30, 5) for p in range(5))
    )
    chosen = np.flatnonzero(index.rejected >= 0)
    assert len(chosen) == expected == sum(index.manifest["pairs"].values())
    assert (index.splits[chosen] == index.splits[index.rejected[chosen]]).all()
    assert (index.prompt_hashes[chosen] == index.prompt_hashes[index.rejected[chosen]]).all()


def test_demonstrations_are_all_desirable_and_have_no_pairs(make_index):
    rows = [{"prompt": "Question?", "completion": f"Text {i}."} for i in range(6)]
    index = make_index(rows, format="demonstrations")
    assert index.desirable.all() and (index.rejected == -1).all() and not index.scores.any()
    assert index.manifest["splits"]["train"] == {"desirable": 6, "undesirable": 0, "prompts": 1}
    assert "scores" not in index.manifest and index.manifest["pairs"]["train"] == 0


@pytest.mark.parametrize("kind", ["thumbs", "pairs", "scores"])
def test_one_completion_of_each_prompt_is_kept_and_the_others_are_unused(make_index, kind):
    rows = [{**row, "completion": row["chosen"], "label": i % 3 > 0, "score": i} for i, row in enumerate(pair_rows(40))]
    index = make_index(rows, format=kind, one_per_prompt=True, holdout=0.3)
    used = np.concatenate([index.sequences("train"), index.sequences("eval")])
    assert len(used) == 20 == len(np.unique(index.prompt_hashes[used]))
    assert len(index.sequences("unused")) == index.manifest["unused"] == len(index.desirable) - 20
    assert (index.rejected == -1).all() and not any(index.manifest["pairs"].values())
    again = make_index(rows, format=kind, one_per_prompt=True, holdout=0.3, seed=1)
    assert not np.array_equal(again.splits, index.splits)


def test_an_unused_copy_of_a_held_out_row_is_no_overlap(make_index):
    rows = [{"prompt": f"Question {i}?", "completion": "Text.", "label": True} for i in range(4)]
    copies = [{"prompt": "New?", "completion": "Yes.", "label": True}] * 3
    index = make_index(rows, copies, one_per_prompt=True)
    assert len(index.sequences("eval")) == 1 and len(index.sequences("unused")) == 2
    with pytest.raises(ConfigError, match=r"also in data\.train"):
        make_index(rows, rows[:1], one_per_prompt=True)


@pytest.mark.parametrize("fields", [{"format": "scores", "score_rule": "bernoulli"}, {}, {"one_per_prompt": True}])
def test_random_choices_do_not_depend_on_how_rows_are_read(make_index, monkeypatch, fields):
    from kto_jax.data.index import builder

    rows = [{**SCORED, "prompt": f"{i % 7}", "completion": f"{i}", "label": i % 2 == 0} for i in range(50)]
    first = make_index(rows, **fields)
    monkeypatch.setattr(builder, "_CHUNK", 3)
    second = make_index(rows, **fields)
    assert first.manifest["content_sha256"] == second.manifest["content_sha256"]
