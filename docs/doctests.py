"""Shows doctests of docstrings as code on the page of the Python API."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n.*\S.*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each doctest, from its first `>>>` to the next empty line, into a code block."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object that was loaded."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(r"\g<indent>```pycon\n\g<0>\n\g<indent>```", obj.docstring.value)
