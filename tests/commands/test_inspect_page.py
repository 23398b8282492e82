"""docs/inspect.md shows what inspect prints."""

from tests.golden.inspect_page import PAGE, page


def test_the_page_of_inspect_is_what_inspect_prints():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.golden.inspect_page and look"
