"""What differs from the recipe that the command names."""

from kto_jax.config import resolve, to_dict
from kto_jax.config.recipes import load
from kto_jax.reports.recipe import differences_from_recipe, differing
from tests import ROOT

TINY = str(ROOT / "configs" / "tiny.py")


def test_a_run_of_a_recipe_differs_where_the_command_line_sets_a_field():
    config = to_dict(resolve({**load(TINY)[1], "seed": 3}))
    for command in (
        f"python -m kto_jax.train --config={TINY}",
        f"python -m kto_jax.train --config {TINY} --config.seed=3",
    ):
        assert differences_from_recipe(command, config) == (f"the recipe {TINY}", [("seed", "0", "3")])


def test_without_the_recipe_the_defaults_are_compared():
    name, found = differences_from_recipe("python -m kto_jax.train --config=gone.py", to_dict(resolve(load(TINY)[1])))
    assert name == "the defaults" and ("epochs", "1", "3") in found
    assert differences_from_recipe("'", {"seed": 1})[0] == "the defaults"


def test_fields_that_one_side_lacks_are_shown():
    assert differing({"a": {"b": 1}}, {"a": {"c": [1]}}) == [("a.b", "1", "–"), ("a.c", "–", "[1]")]
