"""Pages from the templates of this folder: self-contained, and forbidden by their policy to load anything."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from typing import Any

import jinja2
from markupsafe import Markup


def _read(name: str) -> str:
    return importlib.resources.files("kto_jax.reports").joinpath(name).read_text(encoding="utf-8")


def render(name: str, **values: Any) -> str:
    """The HTML of a template of this folder.

    Args:
      name: its file name.
      values: what it shows; all text is escaped but `Markup`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = _read("page.js.jinja")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template(name).render(script=Markup(script), policy=policy, **values)
