"""Checkers: what each accepts and what it does not."""

import pytest

from kto_jax.rewards.checkers import CHECKERS, overlong

CASES = [
    ("lowercase", (), ["all small.", "é ß 3"], ["A", "", "123", "one Big word"]),
    ("no_commas", (), ["one and two"], ["one, two", ""]),
    ("max_words", (2,), ["one", " one  two \n"], ["", "one two three"]),
    ("min_words", (2,), ["one two", "one two three"], ["one", ""]),
    ("starts_with", ("Yes",), ["Yes.", "  Yes"], ["yes", "No. Yes"]),
    ("ends_with", (".",), ["Done.", "Done. \n"], ["Done", "."[:0]]),
    ("contains", ("art",), ["Art is long", "(art)"], ["party", "start"]),
    ("contains", ("c++",), ["use C++ now"], ["c++11", "cc+"]),
    ("bullets", (2,), ["- a\n* b", "x\n  - a\n- b\ny"], ["- a", "- a\n- b\n- c", "a - b\n-c"]),
    ("is_json", (), ['{"a": [1]}', " [1, 2] "], ["1", '{"a": }', '{"a": 1} and more', "[" * 100_000]),
]


@pytest.mark.parametrize("name, arguments, kept, broken", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_checker_gives_1_to_what_keeps_its_rule(name, arguments, kept, broken):
    check = CHECKERS[name](*arguments)
    chat = [[{"role": "assistant", "content": text}] for text in kept]
    assert check(completions=[*kept, *broken, *chat]) == [1.0] * len(kept) + [0.0] * len(broken) + [1.0] * len(kept)


def test_a_number_is_compared_with_the_last_one_of_the_column():
    check = CHECKERS["equals_number"]()
    said = ["so 1,200.50", "it is 7", "12", "none", "5"]
    answers = ["#### 1200.5", 7, "-12", 3, None]
    assert check(completions=said, answer=answers) == [1.0, 1.0, 0.0, 0.0, None]
    assert CHECKERS["equals_number"]("n")(completions=["2"], answer=[2]) == [None]


def test_every_checker_has_a_case():
    assert {name for name, *_ in CASES} | {"equals_number", "overlong"} == set(CHECKERS)


def test_a_completion_is_penalised_as_it_nears_the_limit():
    assert overlong(100, 20)(num_tokens=[1, 80, 85, 90, 100, 130], completions=[]) == [0, 0, -0.25, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer=0 is not between"):
        overlong(100, 0)
