"""Entries of a config.json that change nothing here, and the refusal of those that a family does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kto_jax.config import ConfigError

# transformers writes or has written these into every config.json: about files, about generation, or about other tasks.
_WITHOUT_EFFECT = frozenset([
    "_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "use_bfloat16", "tokenizer_class", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "prefix", "finetuning_task", "problem_type", "num_labels", "id2label", "label2id", "return_dict",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "torchscript",
    "tf_legacy_loss", "pruned_heads", "task_specific_params", "remove_invalid_values", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_decoder", "tie_encoder_decoder", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "cache_implementation", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing", "pretraining_tp",
    "classifier_dropout", "transformers.js_config", "unsloth_version", "unsloth_fixed", "is_llama_config",
    "_sliding_window_pattern", "cross_attention_hidden_size", "add_cross_attention", "quantization_config",
])  # fmt: skip


class Entries(Mapping[str, Any]):
    """A config.json that remembers which entries were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def refuse_unknown(values: Entries, known: set[str], family: str) -> None:
    """Refuses entries that were neither read nor are known to change nothing.

    An entry that is null, false or empty asks for nothing.

    Args:
      values: the entries, after the family read what it knows.
      known: what the family knows besides.
      family: its name.

    Raises:
      ConfigError: names the entries.
    """
    whole = dict(values._values)
    others = whole.keys() - values.read - known - _WITHOUT_EFFECT
    unknown = sorted(name for name in others if whole[name] not in (None, False, "", [], {}))
    if unknown:
        given = ", ".join(f"{name}={whole[name]!r}"[:80] for name in unknown)
        raise ConfigError(
            f"The model's config.json has {given}, which the family {family!r} does not know, so the model may compute "
            "something else than it would here. Every entry must be known. Choose another model, or remove the entry "
            "from config.json if it changes nothing."
        )
