"""The order of the folders and of the modules inside each folder, without import cycles."""

import re

import pytest

from benchmarks.structure import PACKAGE, cycles, find_modules, import_graph, imported_names, unit
from tests import ROOT

ORDER = {
    "kto_jax": [
        "shapes config losses progress",
        "command storage values judges",
        "models data objectives",
        "devices",
        "training",
        "sampling rewards exports",
        "planning rollouts",
        "evaluation",
        "reports",
        "thumbs",
        "train generate export score verify curves inspect plan evaluate compare chat __main__",
        "online",
    ],
    "kto_jax.config": [
        "errors names ranges",
        "secrets",
        "data_fields packages recipes",
        "fields",
        "convert rules",
        "documentation resolve",
    ],
    "kto_jax.data": ["permutation truncation workers", "rows", "tokens", "index", "batches"],
    "kto_jax.data.batches": ["cutting packing partners prefetch reference_logps visits", "schedule"],
    "kto_jax.data.index": ["manifest shared_store", "build_folder conversions", "builder", "index"],
    "kto_jax.data.rows": [
        "message_forms rejection sources tfds",
        "turns",
        "sampled",
        "json_rows layout logged threads",
        "tables",
        "files",
        "chats compared pressed public trees examples exports",
        "layouts",
        "detect",
        "remedies",
        "records",
    ],
    "kto_jax.data.tokens": [
        "gguf_pieces other_templates template tokenizer_files",
        "control_tokens gguf_tokenizer",
        "prompts",
        "encoder",
        "tokenizer",
        "encoded_rows prepare transcript",
    ],
    "kto_jax.devices": [
        "chips compilation gpu_memory processes sharding",
        "experts_on_mesh",
        "attention_on_mesh",
        "inference",
    ],
    "kto_jax.evaluation": [
        "intervals texts",
        "calibration completions length_control verdicts",
        "llm_judge runs",
        "pair_judges",
        "alpaca_eval contest",
    ],
    "kto_jax.exports": ["checkpoint gguf_file push"],
    "kto_jax.judges": ["judges"],
    "kto_jax.losses": [
        "halo logprobs",
        "bco cpo dpo kto orpo policy_gradient ppo reward router sft simpo slic",
        "grpo",
    ],
    "kto_jax.models": [
        "finite four_bits gather gradients grouped int8 rope unstacked",
        "config lora quantised",
        "attention dispatch families heads",
        "layout",
        "experts",
        "transformer",
        "model",
        "weights",
    ],
    "kto_jax.models.attention": ["dense mosaic of_jax", "blockwise cached flash_decoding paged splash triton"],
    "kto_jax.models.families": [
        "multimodal quantization rotary tensors known_entries",
        "family",
        "gemma gpt_neox granite llama mixture olmo phi qwen starcoder",
        "config_json",
    ],
    "kto_jax.models.weights": [
        "gguf_layout safetensors_files tensors value_head",
        "adapter_folder adapter_names bitsandbytes gguf_metadata grown",
        "attached classifier gguf model_files stored_dtype",
        "load",
        "export",
        "peft",
    ],
    "kto_jax.objectives": ["record", "token_level", "algorithms"],
    "kto_jax.planning": [
        "hlo topology",
        "compile_step",
        "rows_that_fit sampling_memory smaller_settings",
        "out_of_memory report",
    ],
    "kto_jax.reports": [
        "captions model_card run_record samples",
        "charts recipe side_by_side template",
        "headline warnings",
        "comparison_page evaluation_page page",
        "results",
    ],
    "kto_jax.rewards": ["endpoint messages reward_model", "checkers", "functions"],
    "kto_jax.rollouts": [
        "figures hand_over kl_weight labels measure policies prompts",
        "advantages options",
        "rounds",
        "runs",
    ],
    "kto_jax.sampling": ["choose logps", "slots", "sample", "complete", "endpoint"],
    "kto_jax.storage": [
        "gguf_files answers atomic bucket bucket_watch folders http_post locks repeated",
        "bucket_copies digests hub lease",
        "run_place sums",
        "fetch",
    ],
    "kto_jax.thumbs": [
        "presses models",
        "conversation endpoint training",
        "asking",
        "page terminal",
        "serve",
    ],
    "kto_jax.training": [
        "checks ending flops",
        "forward inputs metrics microbatches pinning preemption reference resume rounding save_timer state trackers",
        "accumulate agreement initial_state leaf_digests logs optimizer routers run_folder sync",
        "checkpoint_reading",
        "checkpoints in_flight patience precompute step stored_policy unusual verification watchdog",
        "evaluation kept loop result",
    ],
}
"""For each folder its files and folders, line by line: each imports only from lines above its own, at its top or inside
functions. A folder's __init__ may import everything in its folder."""
EXCEPTIONS = {
    ("kto_jax.models.families.config_json", "kto_jax.models.families"): "it reads the table of families",
}
"""Imports against the order, each with its reason."""
CONFINED = {"orbax": {"training"}, "transformers": {"data"}, "datasets": {"data"}, "flax": {"models"}}
"""Packages that only these may import."""
OF_LOSSES = {"__future__", "jax", "jaxtyping", "functools", "collections", "typing", "dataclasses", "math", PACKAGE}
"""All that losses may import."""
MODULES = find_modules(ROOT)
GRAPH = import_graph(MODULES)
LINES = {
    f"{folder}.{name}": number for folder, lines in ORDER.items() for number, line in enumerate(lines)
    for name in line.split()
}  # fmt: skip


def parents(name):
    """The folders that hold a module, from the package down, and the module itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def in_order(importer, imported):
    """Whether the first stands below the second in the folder that holds both, or is that folder's __init__."""
    one, other = parents(importer), parents(imported)
    depth = next((d for d, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if depth is None:  # one of the two is the __init__ of a folder that holds the other
        return len(one) < len(other)
    return LINES[other[depth]] < LINES[one[depth]]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lines_above_its_own(name):
    for parent in parents(name)[1:]:
        assert parent in LINES, f"{parent} has no line: add it to ORDER"
    found = [other for other in GRAPH[name] if not in_order(name, other) and (name, other) not in EXCEPTIONS]
    assert not found, f"{name} imports {found}, which are not above it in ORDER"


def test_every_exception_and_every_line_is_needed():
    assert [pair for pair in EXCEPTIONS if pair[1] not in GRAPH[pair[0]] or in_order(*pair)] == []
    assert [name for name in LINES if name not in MODULES] == []


def test_no_module_imports_itself_through_others():
    assert cycles(GRAPH) == []


@pytest.mark.parametrize("name", MODULES)
def test_packages_stay_where_they_belong(name):
    packages = {module.split(".")[0] for module, _ in imported_names(MODULES[name])}
    for package in packages:
        assert unit(name) in CONFINED.get(package, {unit(name)}), f"{name} imports {package}"
    if unit(name) == "losses":
        assert packages <= OF_LOSSES


FORBIDDEN = [
    r"^\s*(import|from) pickle", r"torch\.load", r"allow_pickle=True", r"(?<![\w.])(eval|exec)\(",
    r"trust_remote_code=True", r"yaml\.load\(", r"shell=True",
]  # fmt: skip


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_file_may_run_code_that_it_reads(pattern):
    for path in [
        path for folder in (PACKAGE, "configs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*.py")
    ]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert not re.search(pattern, line), f"{path}:{number}: {line}"
