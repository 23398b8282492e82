"""Words that differ are marked, unless nearly all do."""

from kto_jax.reports.side_by_side import mark_differences


def joined(parts, marked=None):
    return "".join(text for text, changed in parts if marked is None or changed == marked)


def test_texts_stay_whole_and_their_differences_are_marked():
    before, after = "The film is good.\n\nReally good.", "The film is bad.\n\nReally good."
    left, right = mark_differences(before, after)
    assert (joined(left), joined(right)) == (before, after)
    assert (joined(left, True), joined(right, True)) == ("good.", "bad.")


def test_texts_that_are_hardly_alike_are_not_marked():
    left, right = mark_differences("one two three four", "five six seven eight nine ten")
    assert left == [("one two three four", False)] and right == [("five six seven eight nine ten", False)]


def test_an_empty_text_has_no_parts():
    assert mark_differences("", "a") == ([], [("a", False)])
    assert mark_differences("", "") == ([], [])
