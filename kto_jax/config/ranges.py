"""Types of configuration fields: numbers with a range, and how a type reads in an error or in `--help`."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers that a field accepts: `Annotated[float, Range(above=0)]`.

    Attributes:
      at_least: smallest number.
      above: lower bound that is not itself allowed.
      at_most: largest number.
      below: upper bound that is not itself allowed.
      zero: what 0 means, where it is special.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    zero: str = ""

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        if self.at_least == 0 and self.zero:
            return f"0 ({self.zero}) or more"
        if math.inf == self.at_most == self.below and self.at_least > -math.inf:
            return f"{self.at_least:g} or more"
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most, "below": self.below}
        return ", ".join(f"{word} {bound:.10g}" for word, bound in bounds.items() if math.isfinite(bound))


Auto = Literal["auto"]
Precision = Literal["float32", "bfloat16"]
Number = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Probability = Annotated[float, Range(at_least=0, at_most=1)]
Fraction = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(above=0, at_most=1)]
Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
Labels = Mapping[str, bool | None]


def options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: those of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a type lists: those of every `Literal` in it, also inside a tuple."""
    found: list[Any] = []
    for option in options(hint):
        if typing.get_origin(option) is Literal:
            found += typing.get_args(option)
        elif typing.get_origin(option) is tuple:
            found += choices(typing.get_args(option)[0])
    return tuple(found)


def number_range(option: Any) -> Range | None:
    """The range of an `Annotated` number; None of any other type."""
    return next((extra for extra in getattr(option, "__metadata__", ()) if isinstance(extra, Range)), None)


def base(option: Any) -> Any:
    """The type itself, without what `Annotated` adds."""
    return option.__origin__ if hasattr(option, "__metadata__") else option


def describe(hint: Any) -> str:
    """A type in words: `Annotated[float, Range(above=0)] | Literal["auto"]` is 'a number above 0, or "auto"'."""
    return ", or ".join(_describe(option) for option in options(hint) if option is not type(None))


def _describe(option: Any) -> str:
    kind, bounds = base(option), number_range(option)
    if dataclasses.is_dataclass(kind):
        return "a recipe"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin is tuple and typing.get_origin(arguments[0]) is Literal:
        return f"a tuple of {', '.join(typing.get_args(arguments[0]))}"
    if origin is tuple:
        return "a tuple of texts" if arguments[0] is str else "a tuple of texts and of mappings with a source"
    if origin is not None:
        if kind == Labels:
            return "a mapping of labels to True, False or None"
        return f"a mapping of texts to {_describe(arguments[1])}" if arguments[1] is not Any else "a mapping"
    name = {str: "text", bool: "True or False", int: "an integer", float: "a number"}[kind]
    if not bounds or not str(bounds):
        return "a finite number" if bounds and kind is float else name
    return f"{name}{' ' if str(bounds).startswith('above') else ', '}{bounds}"
