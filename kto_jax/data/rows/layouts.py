"""All layouts by name: which columns of a row hold its prompt, completions and feedback.

"fields" reads the columns that `data.*_field` name. The others have files of their own, which explain them.
"""

from __future__ import annotations

from kto_jax.config import DataConfig
from kto_jax.data.rows.chats import CHATS
from kto_jax.data.rows.compared import COMPARED
from kto_jax.data.rows.exports import EXPORTS
from kto_jax.data.rows.layout import NEEDED, Layout, Reader
from kto_jax.data.rows.pressed import PRESSED
from kto_jax.data.rows.public import PUBLIC
from kto_jax.data.rows.trees import TREES


def _fields(data: DataConfig) -> Reader:
    names = {key: getattr(data, f"{key}_field") for key in ("prompt", *NEEDED[data.format])}
    return lambda fields: [(fields, names)]


LAYOUTS: dict[str, Layout] = {
    "fields": Layout(dict.fromkeys(NEEDED, ()), _fields),
    **CHATS,
    **PUBLIC,
    **COMPARED,
    **TREES,
    **EXPORTS,
    **PRESSED,
}
"""Layouts by their name in `data.layout`."""
