"""A checkpoint of a run as a Hugging Face directory or as an adapter folder, on one device.

from kto_jax.exports.checkpoint import export_checkpoint

export_checkpoint(Path("runs/mine"), Path("out"), step="best", dtype="bfloat16")
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, LoraConfig
from kto_jax.data.tokens import tokenizer_files
from kto_jax.models.weights.export import Rounding, save_hugging_face
from kto_jax.models.weights.load import is_multimodal
from kto_jax.models.weights.model_files import ModelFiles, find_model
from kto_jax.models.weights.peft import save_adapters
from kto_jax.training.stored_policy import load_checkpoint


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
      folder: where it is.
      step: steps that were taken.
      is_adapter: whether it holds adapters alone.
      dtype: of the weights.
      rounding: the effect of rounding to that dtype; None for adapters, which are never rounded.
    """

    folder: Path
    step: int
    is_adapter: bool
    dtype: str
    rounding: Rounding | None


def export_checkpoint(
    run: Path,
    folder: Path | None = None,
    *,
    step: str = "last",
    dtype: str = "auto",
    merge: bool = False,
    strict: bool = False,
) -> Exported:
    """Writes a checkpoint as a directory that transformers opens, or peft if it holds adapters.

    Args:
      run: the folder of a run.
      folder: where to write; an earlier export there is replaced. None is RUN/exports/STEP.
      step: "last", "best" (by the run's evaluation.metric) or a number.
      dtype: of the weights; "auto" is that of the run's policy/.
      merge: write a run of adapters as a whole model.
      strict: refuse a damaged last checkpoint. Otherwise the one before it is exported, with a warning.

    Raises:
      ConfigError: there is no such run or checkpoint, a weight is not finite, or `folder` holds something else.
    """
    number, stored = load_checkpoint(run, step, strict=strict)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    is_adapter = settings.get("lora", {}).get("rank", 0) > 0 and not merge
    folder = folder or run / "exports" / f"{number}{'-adapter' if is_adapter else ''}"
    tokenizer = run / "tokenizer"
    card = _card(run, number, settings, is_adapter=is_adapter)
    if is_adapter:
        lora = LoraConfig(**settings["lora"])
        base, files = _base(settings)
        merged = files.adapter if settings["lora"].get("start", "new") == "new" else None
        save_adapters(
            folder, stored.model, stored.trained, lora=lora, base=base, merged=merged, tokenizer_dir=tokenizer,
            model_card=card, is_multimodal=is_multimodal(files.weights),
        )  # fmt: skip
        return Exported(folder, number, True, "float32", None)
    dtype = _dtype(settings) if dtype == "auto" else dtype
    rounding = save_hugging_face(
        folder, stored.model, stored.policy, tokenizer_dir=tokenizer, model_card=card, stop_ids=_stop_ids(run),
        dtype=dtype,
    )  # fmt: skip
    return Exported(folder, number, False, dtype, rounding)


def _base(settings: dict[str, Any]) -> tuple[str, ModelFiles]:
    """The model that the run's adapters belong to, and the files that the run began with."""
    model = settings["model"]
    if model["init"] == "random":
        raise ConfigError(
            "the run began with random weights, so its adapters have no base that a file holds. Adapters need one. "
            "Set --merge, which exports base and adapters as one model."
        )
    files = find_model(model["path"], model.get("base", ""))
    base = model.get("base") or model["path"]
    base = str(Path(base).resolve()) if Path(base).exists() else base
    return base, files


def _dtype(settings: dict[str, Any]) -> str:
    """The dtype of the run's policy/; for a run that predates this setting, the dtype that it trained in."""
    chosen = settings.get("export", {}).get("dtype", "auto")
    return str(settings["model"].get("param_dtype", "float32") if chosen == "auto" else chosen)


def _stop_ids(run: Path) -> tuple[int, ...]:
    """The ids that end a completion, besides those in the model's config."""
    import tokenizers

    eos_id = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["eos_id"]
    own = tokenizer_files.read_special_tokens(run / "tokenizer").get("eos_token")
    own_id = tokenizers.Tokenizer.from_file(str(run / "tokenizer" / tokenizer_files.TOKENIZER)).token_to_id(own or "")
    return tuple(dict.fromkeys(found for found in (eos_id, own_id) if found is not None))


def _card(run: Path, step: int, settings: dict[str, Any], *, is_adapter: bool) -> str:
    library = "peft" if is_adapter else "transformers"
    objective = settings["objective"]["name"]
    task = "text-classification" if objective == "reward" else "text-generation"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [{objective}, kto_jax]\n---\n\n# {run.name}\n\n"
        f"`{settings['model']['path']}`, trained with {objective.upper()} by kto_jax: the checkpoint after {step} "
        "steps. The run's config.json, manifest.json and metrics.jsonl have the details. The licence is the "
        "base model's.\n"
    )
