"""Layouts of public datasets.

halos           the four shapes of the JSON files of the HALOs code, distinguished by their field "type"
hh              Anthropic HH-RLHF: chosen and rejected, two whole transcripts
shp             Stanford Human Preferences: history, human_ref_A, human_ref_B, labels
ultrafeedback   UltraFeedback, binarized: prompt, chosen and rejected with the prompt repeated
kto_mix         kto-mix: prompt, completion, label
"""

from __future__ import annotations

from kto_jax.config import DataConfig
from kto_jax.data.rows.layout import Examples, Fields, Layout, by_row, has, named
from kto_jax.data.rows.turns import BadRowError, present

_HALOS_TYPES = {
    "demonstrations": "sample",
    "thumbs": "binary_feedback",
    "pairs": "pairwise_feedback",
    "scores": "scalar_feedback",
}


def _halos(data: DataConfig, fields: Fields) -> Examples:
    expected, found = _HALOS_TYPES[data.format], present(fields, "type")
    if found != expected:
        raise BadRowError(f"type is {str(found)[:40]!r}, and data.format {data.format!r} reads {expected!r}")
    names = {"prompt": "prompt" if "prompt" in fields else "instruction", "completion": "output"}
    if data.format == "pairs":
        first, second = ("output_A", "output_B") if _zero_or_one(fields, "label") else ("output_B", "output_A")
        return [(fields, {"prompt": names["prompt"], "chosen": first, "rejected": second})]
    if data.format == "scores":
        names["score"] = "reward"
    if data.format == "thumbs":
        names["label"] = "label"
        fields = {**fields, "label": _zero_or_one(fields, "label")}
    return [(fields, names)]


def _shp(data: DataConfig, fields: Fields) -> Examples:
    sides = ("human_ref_A", "human_ref_B") if _zero_or_one(fields, "labels") else ("human_ref_B", "human_ref_A")
    return [(fields, {"prompt": "history", "chosen": sides[0], "rejected": sides[1]})]


def _zero_or_one(fields: Fields, name: str) -> bool:
    value = present(fields, name)
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    raise BadRowError(f"{name} is not 0 or 1: {str(value)[:40]!r}")


PUBLIC = {
    "halos": Layout(
        {
            "demonstrations": ("type", "output"),
            "thumbs": ("type", "prompt", "output", "label"),
            "pairs": ("type", "prompt", "output_A", "output_B", "label"),
            "scores": ("type", "prompt", "output", "reward"),
        },
        by_row(_halos),
        fits=lambda fields: str(fields.get("type")) in _HALOS_TYPES.values(),
    ),
    "hh": Layout({"pairs": ("chosen", "rejected")}, named("chosen", "rejected")),
    "shp": Layout(
        {"pairs": ("history", "human_ref_A", "human_ref_B", "labels")},
        by_row(_shp),
        fits=has("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "ultrafeedback": Layout({"pairs": ("prompt", "chosen", "rejected")}, named("prompt", "chosen", "rejected")),
    "kto_mix": Layout({"thumbs": ("prompt", "completion", "label")}, named("prompt", "completion", "label")),
}
"""See the text at the top of this file."""
