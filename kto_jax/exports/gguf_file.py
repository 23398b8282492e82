"""A model directory as one GGUF file with its tokenizer, in the layout that llama.cpp reads.

A model that llama.cpp would compute otherwise is refused with what differs, and so is a tokenizer that it has no name
for. Matrices get the chosen kind; norms, biases and routers stay float32. Names, the order of rows and the metadata of
each family are in models/weights/gguf_layout.py, the reader in models/weights/gguf.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.config.packages import require
from kto_jax.data.tokens import tokenizer_files
from kto_jax.data.tokens.gguf_pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED, describe_pieces
from kto_jax.data.tokens.gguf_tokenizer import name_pre_tokenizer
from kto_jax.models.config import TransformerConfig
from kto_jax.models.weights.gguf_layout import LAYOUTS, Layout
from kto_jax.models.weights.gguf_metadata import differences, rope_tensors, write_metadata
from kto_jax.models.weights.load import is_reward_model, open_weights, read_config
from kto_jax.models.weights.safetensors_files import Weights
from kto_jax.models.weights.tensors import expected_shapes
from kto_jax.storage.atomic import new_file

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""llama.cpp's numbers of the kinds (general.file_type)."""
_OTHERWISE = "Export a Hugging Face directory, without --gguf, and convert that with llama.cpp."


def write_gguf(file: Path, directory: Path, kind: str, *, name: str) -> None:
    """Writes a model directory as a GGUF file.

    Args:
      file: the path; an existing file is replaced.
      directory: a Hugging Face directory with weights and tokenizer.
      kind: "q8_0", "f16", "bf16" or "f32": what matrices are kept in. Rows whose length is not a multiple of 32 are
        kept in f16 if q8_0 is chosen.
      name: the model's name in the file.

    Raises:
      ConfigError: the architecture or the tokenizer is of another kind.
    """
    require("gguf", f"--gguf={kind}", "export a Hugging Face directory, without --gguf")
    import gguf

    config = read_config(directory)
    layout = _check_architecture(config, directory)
    fields = _tokenizer_fields(directory, config.vocab_size)
    with new_file(file) as partial:
        writer = gguf.GGUFWriter(partial, layout.architecture)
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[kind])
        _add_architecture(writer, config, layout)
        for field, add in (
            ("model", writer.add_tokenizer_model), ("pre", writer.add_tokenizer_pre), ("tokens", writer.add_token_list),
            ("scores", writer.add_token_scores), ("types", writer.add_token_types),
            ("merges", writer.add_token_merges), ("space_prefix", writer.add_add_space_prefix),
            ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("eot", writer.add_eot_token_id),
            ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id),
            ("add_bos", writer.add_add_bos_token), ("template", writer.add_chat_template),
        ):  # fmt: skip
            if fields.get(field) is not None:
                add(fields[field])
        _add_tensors(writer, config, directory, kind, layout)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_architecture(config: TransformerConfig, directory: Path) -> Layout:
    """How llama.cpp keeps this model.

    Raises:
      ConfigError: it would compute something else.
    """
    layout = LAYOUTS.get(config.family)
    other = [] if layout is None else differences(config, layout)
    if is_reward_model(directory):
        other.append("a reward head")
    if layout is None or other:
        what = f" with {'; '.join(other)}" if other else ""
        raise ConfigError(
            f"{directory} is a model of family {config.family!r}{what}, which is not written as GGUF. Language models "
            f"are, of the families {', '.join(LAYOUTS)}, with what llama.cpp computes of them. {_OTHERWISE}"
        )
    return layout


def _add_architecture(writer: Any, config: TransformerConfig, layout: Layout) -> None:
    for key, value in write_metadata(config, layout).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{layout.architecture}.{key}", value)


def _add_tensors(writer: Any, config: TransformerConfig, directory: Path, kind: str, layout: Layout) -> None:
    import gguf
    from gguf import quants

    stored_name = layout.stored_names(config.num_layers)
    for name, values in _joined(open_weights(directory), expected_shapes(config)):
        order, offset, stored = layout.row_order(name, config), layout.offset(name, config), stored_name(name)
        if order is not None:
            values = values[np.argsort(order)]
        values = values + np.float32(offset) if offset else values
        is_kept = values.ndim == 1 or ".ffn_gate_inp." in stored  # norms, biases and routers
        own = "f32" if is_kept else "f16" if kind == "q8_0" and values.shape[-1] % 32 else kind
        tensor_kind = gguf.GGMLQuantizationType[own.upper()]
        writer.add_tensor(stored, quants.quantize(values, tensor_kind), raw_dtype=tensor_kind)
    for stored, values in rope_tensors(config, layout).items():
        writer.add_tensor(stored, values)


def _joined(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory in float32; those of a layer's experts as one, under a name without a number."""

    def read(name: str) -> np.ndarray:
        return np.asarray(weights.read(name, (slice(None),) * len(shapes[name])), np.float32)

    experts: dict[str, list[str]] = {}
    for name in shapes:
        experts.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(name)
    for joined, names in experts.items():
        yield joined, read(joined) if names == [joined] else np.stack([read(name) for name in names])


def _tokenizer_fields(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer of a directory as GGUF's fields.

    Raises:
      ConfigError: it is no byte-level BPE, or splits words in a way that llama.cpp has no name for here.
    """
    import tokenizers

    file = directory / tokenizer_files.TOKENIZER
    if not file.is_file():
        raise ConfigError(f"{directory} has no tokenizer.json. A GGUF file holds its tokenizer. {_OTHERWISE}")
    definition = json.loads(file.read_text(encoding="utf-8"))
    model = definition["model"]
    fields = _describe_bpe(definition, vocab_size) if model.get("type") == "BPE" else None
    if fields is None:
        raise ConfigError(
            f"the tokenizer of {directory} is {model.get('type')} with the normalizer "
            f"{json.dumps(definition.get('normalizer'))[:200]} and the pre-tokenizer "
            f"{json.dumps(definition.get('pre_tokenizer'))[:200]}. Byte-level BPE as in GPT-2, SmolLM2, Llama 3 and "
            f"Qwen2 is written, and pieces with byte fallback as in Gemma and Llama 2. {_OTHERWISE}"
        )
    tokens = fields["tokens"]
    special = tokenizer_files.read_special_tokens(directory)
    ids = {
        name: tokens.index(special[f"{name}_token"])
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token" in special
    }
    starts = tokenizers.Tokenizer.from_file(str(file)).encode("a").ids[:1]
    ends = _ends(directory)
    return fields | ids | {
        "eot": next((end for end in ends if end != ids.get("eos")), None),
        "add_bos": starts == [ids.get("bos")], "template": tokenizer_files.read_template(directory),
    }  # fmt: skip


def _describe_bpe(definition: dict[str, Any], vocab_size: int) -> dict[str, Any] | None:
    """The vocabulary of a BPE as GGUF's fields; None if llama.cpp has no name for its kind here."""
    pieces, pre = describe_pieces(definition, vocab_size), name_pre_tokenizer(definition)
    if pieces is not None:
        return {"model": "llama", "pre": "default"} | pieces
    if pre is None:
        return None
    model = definition["model"]
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "types": types, "merges": merges}


def _ends(directory: Path) -> list[int]:
    """The ids that end a completion, from generation_config.json."""
    file = directory / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return found if isinstance(found, list) else [] if found is None else [found]
