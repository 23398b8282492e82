import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kto_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReferenceConfig,
    SamplesConfig,
)
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.models.config import TransformerConfig
from kto_jax.objectives import make_objective
from kto_jax.training.checks import check_conflicts, check_judges, check_models
from kto_jax.training.inputs import (
    _encode_controls,
    count_visits,
    grown_vocab,
    make_schedules,
)
from tests import TINY_MODEL
from tests.synthetic import make_index

ARCHITECTURE = TransformerConfig(
    vocab_size=50, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, max_length=64
)

KTO = make_objective(ObjectiveConfig(), num_desirable=1, num_undesirable=1)


def config(**changes):
    data = DataConfig(train="x", max_length=38, max_prompt_length=19)
    return Config(**{"model": ModelConfig(path="x"), "data": data, "batch_size": 16, "microbatch_rows": 8} | changes)


def test_an_evaluation_is_a_random_sample_even_if_the_file_is_sorted_by_prompt():
    index = make_index(400, num_prompts=40)
    index.prompt_hashes.sort()
    index.splits[:] = 1
    index.splits[:8] = 0
    _, held_out = make_schedules(config(), index, KTO, None)
    batch = held_out.batch(0)
    assert np.sum(batch.unmatched.filled) == 16
    assert len({int(index.prompt_hashes[row]) for row in held_out.step(0).ids}) > 8
    assert held_out.step(0).ids.tolist() == make_schedules(config(seed=5), index, KTO, None)[1].step(0).ids.tolist()


def test_without_held_out_rows_there_is_no_evaluation():
    assert make_schedules(config(), make_index(40), KTO, None)[1] is None


def test_a_reference_may_differ_in_what_does_not_change_its_logits():
    other = dataclasses.replace(ARCHITECTURE, eos_ids=(1, 2), bos_id=7, initializer_range=0.1)
    check_models(config(), ARCHITECTURE, other)
    with pytest.raises(ConfigError, match=r"another architecture than the policy: rope_theta 5.0 against 10000.0"):
        check_models(config(), ARCHITECTURE, dataclasses.replace(other, rope_theta=5.0))
    with pytest.raises(ConfigError, match="beyond the model's context of 32"):
        check_models(config(), ARCHITECTURE, dataclasses.replace(other, max_length=32))


def test_a_judge_without_feedback_of_its_own_is_refused_before_training():
    index = make_index(40)
    index.manifest["splits"] = {"judge": {"desirable": 3, "undesirable": 0}}
    check_judges(config(), index)
    check_judges(config(samples=SamplesConfig(num_prompts=4, judges=("vader",))), index)
    with pytest.raises(ConfigError, match=r"leaves 3 desirable and 0 undesirable.*Raise config.data.judge_holdout"):
        check_judges(config(samples=SamplesConfig(num_prompts=4, judges=("feedback",))), index)


def objective(name, **options):
    return make_objective(ObjectiveConfig(name=name, **options), num_desirable=1, num_undesirable=1)


def labelled(desirable):
    index = make_index(40)
    index.desirable[:] = desirable
    return index


def test_thumbs_need_both_labels_and_demonstrations_the_desirable_one():
    for name in ("kto", "bco", "csft", "ppo_offline"):
        with pytest.raises(ConfigError, match=r"all 40 completions to train on are desirable.* needs both labels"):
            make_schedules(config(), labelled(True), objective(name), None)
    with pytest.raises(ConfigError, match=r"are undesirable.* needs desirable completions"):
        make_schedules(config(), labelled(False), objective("sft"), None)
    assert make_schedules(config(), labelled(True), objective("sft"), None)[0].num_steps == 3
    scored = objective("ppo_offline", rewards="scores")  # a score says more than its label
    assert make_schedules(config(), labelled(True), scored, None)[0].num_steps == 3


def test_demonstrations_are_the_desirable_rows_and_are_measured_beside_the_others():
    index = make_index(40)
    index.splits[20:] = 1
    schedule, held_out = make_schedules(config(), index, objective("sft"), None)
    visited = np.concatenate([schedule.step(step).ids for step in range(schedule.num_steps)])
    assert sorted(visited) == np.flatnonzero(index.desirable[:20]).tolist()
    assert sorted(np.concatenate([held_out.step(step).ids for step in range(held_out.num_steps)])) == [*range(20, 40)]
    index.desirable[20:] = False
    assert make_schedules(config(), index, objective("sft"), None)[1] is None  # no demonstration is held out


def test_pairs_are_visited_by_their_chosen_rows_in_rows_twice_as_long():
    index = make_index(40, paired=True)
    index.splits[30:] = 1
    schedule, held_out = make_schedules(config(), index, objective("dpo"), None)
    assert schedule.batch(0).matched.tokens.shape[-1] == 2 * 38
    assert schedule.num_steps == 1
    assert len(held_out.step(0).ids) == 10
    with pytest.raises(ConfigError, match="reads pairs, and none of 40 completions to train on make one"):
        make_schedules(config(), make_index(40), objective("dpo"), None)


def test_a_source_is_visited_by_its_weight_and_held_out_rows_once_each():
    index = make_index(40)
    index.places[30:, 0] = 1
    index.desirable[:] = np.arange(40) % 10 < 5
    index.manifest["sources"] = [{"weight": 0.5}, {"weight": 3.0}]
    schedule, _ = make_schedules(config(), index, KTO, None)
    assert schedule.num_examples == 15 + 30
    read = np.concatenate([schedule.step(step).ids for step in range(schedule.num_steps)])
    assert np.bincount(read[read >= 30], minlength=40)[30:].tolist() == [3] * 10
    index.splits[25:] = 1
    schedule, held_out = make_schedules(config(), index, KTO, None)
    assert schedule.num_examples == 13 and held_out.num_examples == 15


def test_labels_are_counted_as_often_as_an_epoch_visits_them():
    index = make_index(40)
    index.desirable[:] = np.arange(40) < 30
    assert count_visits(index) == (30, 10)
    index.places[20:, 0] = 1
    index.manifest["sources"] = [{"weight": 0.5}, {"weight": 3.0}]
    assert count_visits(index) == (10 + 30, 30)
    index.splits[35:] = 2
    assert count_visits(index) == (10 + 30, 15)


def test_an_auto_row_length_fits_the_rows_that_are_visited_often():
    index = make_index(400, min_length=4, max_length=38)
    lengths = np.diff(index.offsets)
    index.places[lengths > 20, 0] = 1
    found = []
    for weights in ((0.01, 50.0), (50.0, 0.01)):
        index.manifest["sources"] = [{"weight": weight} for weight in weights]
        schedule, _ = make_schedules(config(row_length="auto"), index, KTO, None)
        found.append(schedule.batch(0).matched.tokens.shape[-1])
    assert found[0] > found[1]


@pytest.mark.parametrize("name, shortest", [("kto", 38), ("dpo", 76)])
def test_an_auto_row_length_is_chosen_from_the_lengths_and_reduces_padding(name, shortest):
    index = make_index(400, paired=True)

    def padding(row_length):
        schedule, _ = make_schedules(config(row_length=row_length, microbatch_rows=2), index, objective(name), None)
        used = [schedule.batch(step).matched.segment_ids[: schedule.batch(step).num_matched] for step in range(8)]
        return used[0].shape[-1], np.mean([np.mean(ids == 0) for ids in used])

    (plain, much), (chosen, little) = padding(0), padding("auto")
    assert plain == shortest
    assert chosen > shortest
    assert little < much


def test_only_objectives_that_read_unrelated_completions_pack_them():
    index = make_index(40, paired=True)
    for name, packed in (("kto", True), ("kto_log_utility", True), ("bco", False), ("dpo", False), ("orpo", False)):
        assert (make_schedules(config(), index, objective(name), None)[0].batch(0).num_unmatched > 0) == packed


def test_controls_precede_completions_and_held_out_completions_follow_the_good_one():
    index = make_index(40)
    index.splits[20:] = 1
    bad, good = np.array([1], np.int32), np.array([2, 2], np.int32)
    roomy = config(data=DataConfig(train="x", max_length=42, max_prompt_length=19))
    schedule, held_out = make_schedules(roomy, index, objective("csft"), (bad, good))

    def controls(batch):
        rows = batch.matched
        for microbatch, row, slot in np.argwhere(rows.filled):
            first = np.flatnonzero(rows.target_segments[microbatch, row] == slot + 1)[0]
            end = rows.predictors[microbatch, row, first] + 1
            yield bool(batch.desirable[microbatch, row, slot]), rows.tokens[microbatch, row, end - 2 : end].tolist()

    assert all(tokens == [2, 2] if desirable else tokens[1] == 1 for desirable, tokens in controls(schedule.batch(0)))
    assert all(tokens == [2, 2] for _, tokens in controls(held_out.batch(0)))


@pytest.mark.parametrize("options, elsewhere, message", [
    ({"name": "orpo"}, {"reference": ReferenceConfig(path="y")}, "config.reference.path='y' has no use"),
    ({"name": "orpo"}, {"reference": ReferenceConfig(sync_every=3)}, "sync_every=3 has no use"),
    ({"name": "reward"}, {"samples": SamplesConfig(num_prompts=2)}, "writes no text"),
    ({"name": "kto"}, {"reference": ReferenceConfig(sync_mix=0.5)}, "no use: reference.sync_every is 0"),
    ({"name": "bco"}, {"optimizer": OptimizerConfig(value_clip_norm=0.5)}, "'bco' has no value head"),
    ({"name": "kto"}, {"data": DataConfig(train="x", score_threshold=3.0)}, "score_threshold=3.0 has no use"),
    ({"name": "kto"}, {"data": DataConfig(train="x", score_rule="mean")}, "no source holds scores, as"),
    ({"name": "kto"}, {"data": DataConfig(train=({"source": "y", "score_rule": "mean"},))}, "'y'.* has its own.*, and"),
    ({"name": "ppo_offline", "rewards": "scores"},
     {"data": DataConfig(train=({"source": "y", "format": "scores"}, "z"))},
     "needs scores, and the format of 'z' is 'thumbs'"),
    ({"name": "kto"}, {"batch_size": 1}, "batch_size=1 leaves no other example"),
    ({"name": "ppo_offline", "rewards": "scores"}, {}, "needs scores, and the format of 'x' is 'thumbs'"),
])  # fmt: skip
def test_settings_that_an_objective_does_not_use_are_refused(options, elsewhere, message):
    check_conflicts(config(), KTO)
    with pytest.raises(ConfigError, match=message):
        check_conflicts(config(objective=ObjectiveConfig(**options), **elsewhere), objective(**options))


def test_a_batch_of_one_is_enough_where_no_unrelated_completion_is_read():
    check_conflicts(config(batch_size=1), objective("sft"))


@pytest.mark.parametrize("text, message", [("", r"becomes the tokens \[\]"), ("~", r"'~' becomes the tokens \[\d+\]")])
def test_a_control_without_tokens_or_beyond_the_vocabulary_is_refused(text, message, tmp_path):
    tokenizer = prepare_tokenizer(Path("configs/tiny_model"), tmp_path / "tokenizer", chat_template="auto")
    csft = objective("csft")
    bad, good = _encode_controls(csft, tokenizer, 512)
    assert len(bad) > 1
    assert len(good) > 1
    with pytest.raises(ConfigError, match=message):
        _encode_controls(dataclasses.replace(csft, controls=(text, "<|good|>")), tokenizer, 30)


@pytest.mark.parametrize("elsewhere, message", [
    ({"reference": ReferenceConfig(path="other")}, r"reference.path='other'.*rank=4: the reference is the policy"),
    ({"reference": ReferenceConfig(sync_every=4)}, r"reference.sync_every=4.*rank=4: the frozen weights cannot move"),
    ({"model": ModelConfig(path="x", param_dtype="bfloat16")}, r"param_dtype='bfloat16'.*adapters are small"),
])  # fmt: skip
def test_settings_that_conflict_with_adapters_are_refused(elsewhere, message):
    adapters = {"lora": LoraConfig(rank=4)}
    check_conflicts(config(**adapters), KTO)
    check_conflicts(config(**adapters, reference=ReferenceConfig(param_dtype="int8")), objective("orpo"))
    with pytest.raises(ConfigError, match=message):
        check_conflicts(config(**adapters, **elsewhere), KTO)


@pytest.mark.parametrize("options", [
    {"alpha": 8.0}, {"targets": ("query",)}, {"zero": "a"}, {"dora": True}, {"rank_pattern": ("query=2",)},
])  # fmt: skip
def test_settings_of_adapters_without_a_rank_are_refused(options):
    with pytest.raises(ConfigError, match=r"has no use: lora\.rank is 0"):
        check_conflicts(config(lora=LoraConfig(**options)), KTO)


def test_the_vocabulary_grows_to_the_tokenizer_s_only_on_request(tmp_path):
    tokenizer = prepare_tokenizer(TINY_MODEL, tmp_path / "t", chat_template="none", added_tokens=("<a>", "<b>"))
    size = tokenizer.vocab_size
    asked = lambda **model: config(model=ModelConfig(path="x", **model))  # noqa: E731
    assert grown_vocab(asked(), size - 2, tokenizer) == size - 2
    assert grown_vocab(asked(grow_vocab=1), size - 2, tokenizer) == size
    assert grown_vocab(asked(grow_vocab=1), size + 7, tokenizer) == size + 7
    assert grown_vocab(asked(grow_vocab=128), size - 2, tokenizer) == -(-size // 128) * 128
    assert grown_vocab(asked(added_tokens=("<a>",)), size, tokenizer) == size  # they fit into the padding
    with pytest.raises(ConfigError, match=rf"ids up to {size - 1}.*ends at {size - 3}.*Set config.model.grow_vocab=1"):
        grown_vocab(asked(added_tokens=("<a>", "<b>")), size - 2, tokenizer)


def test_new_tokens_need_a_trained_embedding():
    model = ModelConfig(path="x", added_tokens=("<a>",), grow_vocab=1)
    check_conflicts(config(model=model), KTO)
    check_conflicts(config(model=model, lora=LoraConfig(rank=4, modules_to_save=("embedding",))), KTO)
    with pytest.raises(ConfigError, match=r"added_tokens.*rank=4 alone.*modules_to_save=embedding"):
        check_conflicts(config(model=model, lora=LoraConfig(rank=4)), KTO)


@pytest.mark.parametrize("kept", ["int8", "nf4", "int4"])
def test_a_quantised_reference_does_not_move(kept):
    moving = config(reference=ReferenceConfig(param_dtype=kept, sync_every=4))
    with pytest.raises(ConfigError, match=kept + r".*sync_every=4: each move.*Set config.reference.param_dtype"):
        check_conflicts(moving, objective("kto"))
