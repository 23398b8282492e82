"""A tokenizer of pieces with byte fallback, as Gemma and Llama 2 have one."""

import json

from tokenizers import Tokenizer, models, normalizers, trainers

from tests import ROOT

PREPEND, REPLACE = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
TEXTS = ("Name a film.", " two  spaces\n\tand a tab", "naïve 東京 🎬!", "<s>Which film?</s> None", "", "(e.g. “x”)")
BOS, EOS = 1, 2


def make_pieces(*, prefix, size=500):
    """A tokenizer.json that was trained on this project's README."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    lines = (ROOT / "README.md").read_text().splitlines()
    tokenizer.train_from_iterator((word for line in lines for word in line.replace(" ", " ▁").split()),
                                  trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))  # fmt: skip
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(trained["vocab"], key=trained["vocab"].get)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoder += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": tokens[number]} | special for number in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]} if prefix else REPLACE,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": trained
        | {
            "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def write_pieces(directory, *, prefix):
    """Writes the files of such a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(make_pieces(prefix=prefix)))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
