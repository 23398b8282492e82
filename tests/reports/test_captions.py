"""Captions of the report hold for the objective that was trained."""

import functools

import jax.numpy as jnp
import pytest

from kto_jax.config import ObjectiveConfig
from kto_jax.objectives import OBJECTIVES, Objective, make_objective
from kto_jax.reports import captions
from kto_jax.reports.captions import captions_of
from kto_jax.reports.page import Report, render_report
from kto_jax.shapes import Completions


def make(name, **options):
    return make_objective(ObjectiveConfig(name=name, **options), num_desirable=1, num_undesirable=1)


def row(objective):
    """A step's figures, as the objective has them."""
    figures = {
        "step": 1,
        "loss": 1.0,
        "rewards_desirable": 0.1,
        "rewards_undesirable": -0.1,
        "auc": 0.5,
        "accuracy": 0.5,
    }
    if objective.first_pass != "none":
        figures |= {"z0": 0.1}
    return figures


@functools.cache
def report_of(name, **options):
    objective = make(name, **options)
    report = Report("t", "c", {}, {}, [row(objective)], captions=captions_of(name, objective))
    return render_report(report)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_kto_and_its_utility_mention_z0(name):
    assert ("z0" in report_of(name)) == (name in ("kto", "kto_log_utility"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_classes_have_the_names_of_what_the_objective_reads(name):
    text = report_of(name)
    pairs = make(name).reads == "pairs"
    title = "Chosen against rejected" if pairs else "Desirable against undesirable"
    assert f"<h3>{title}</h3>" in text
    assert ("share of pairs whose chosen" in text) == pairs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_own_captions(name):
    """A new objective needs a line in the tables of captions.py."""
    objective = make(name)
    assert captions_of(name, objective).loss != captions.Captions.loss
    assert objective.uses_reference or name in captions._REWARDS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kto", "share of desirable completions above z0"),
        ("bco", "share of desirable completions above the running mean δ"),
        ("dpo", "the loss is 0.693 (with weights of 1)"),
        ("sft", "Mean log-probability of a completion token, in nats.</figcaption>"),
        ("reward", "What the reward head gives a completion."),
    ],
)
def test_captions_say_what_the_figures_of_the_objective_mean(name, expected):
    assert expected in report_of(name)


STARTS = [(name, variant, loss) for name, starts in captions._LOSS_AT_START.items() for variant, loss in starts.items()]


@pytest.mark.parametrize(("name", "variant", "expected"), STARTS)
def test_the_loss_starts_where_its_caption_says(name, variant, expected):
    objective = make(name, **({"variant": variant} if variant else {}))
    zeros = jnp.zeros((1, 2))
    completions = Completions(
        policy=zeros,
        reference=zeros,
        likelihood=zeros,
        lengths=zeros + 3,
        desirable=jnp.array([[True, False]]),
        scores=zeros,
        filled=jnp.ones((1, 2), bool),
    )
    state = {key: jnp.array(value) for key, value in objective.initial_state.items()}
    assert float(objective.loss(completions, jnp.zeros(()), state)[0, 0]) == pytest.approx(expected, abs=5e-4)
    assert f"the loss is {expected:g} " in captions_of(name, objective).loss


def test_an_sft_term_is_mentioned():
    assert "0.5 times the SFT term of kto included" in captions_of("kto", make("kto", sft_weight=0.5)).loss


def test_an_objective_that_a_user_has_added_gets_captions_that_hold_for_all():
    mine = Objective("thumbs", loss=lambda completions, point, state: completions.policy)
    found = captions_of("mine", mine)
    assert found.loss == captions.Captions.loss
    assert "above the reference point" in found.ranking
