"""What a run leaves behind, opened by transformers and peft: the same logits and the same greedy text."""

import hashlib
import json

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from kto_jax.data.tokens.tokenizer import encode_prompts
from kto_jax.export import main as export
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.complete import open_language_model
from kto_jax.sampling.sample import Sampling, sample
from kto_jax.train import main as train
from kto_jax.training.stored_policy import load_policy
from tests import ROOT, TINY_MODEL
from tests.parity.test_families import close
from tests.parity.test_transformers import our_logits, their_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(1, 500, (2, 40))
PROMPTS = ["name a film", "Où?"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=16)
RANK, ALPHA, TARGETS = 2, 6, {"q_proj": "query", "v_proj": "value", "down_proj": "down"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model, with weights of a size that decides greedy text."""
    folder = tmp_path_factory.mktemp("parity") / "base"
    model = Model.create(read_config(TINY_MODEL))
    params = jax.tree.map(lambda leaf: leaf * 4, model.init_params(jax.random.key(0), "float32"))
    save_hugging_face(folder, model, params, tokenizer_dir=TINY_MODEL, model_card="")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model, folder, settings) trains a few steps of KTO into the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "parity_cache"))

        def trained(path, folder, *settings):
            command = ["--config=configs/tiny.py", f"--config.model.path={path}", "--config.model.init=pretrained"]
            command += ["--config.evaluation.every=0", "--config.evaluation.max_examples=16", f"--workdir={folder}"]
            command += ["--config.optimizer.warmup_steps=0", "--config.optimizer.schedule=constant"]
            assert train([*command, *settings]) == 0
            return folder

        yield trained


@pytest.fixture(scope="module")
def adapter(torch, transformers, peft, base):
    """Adapters that peft made and trained for a few steps."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([leaf for leaf in model.parameters() if leaf.requires_grad], lr=0.05)
    for _ in range(4):
        loss = model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base.parent / "sft")
    return base.parent / "sft"


def by_peft(torch, transformers, peft, base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return their_logits(torch, peft.PeftModel.from_pretrained(model, adapter).eval(), TOKENS)


def here(path):
    files = find_model(str(path))
    model = Model.create(read_config(files.weights))
    return our_logits(model, load_params(model, files, param_dtype="float32"), TOKENS)


def reference_digest(run):
    """Digest of every array of the reference that a run keeps."""
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load(run / "checkpoints" / "reference"))
    parts = [f"{jax.tree_util.keystr(key)} {hashlib.sha256(np.asarray(leaf)).hexdigest()}" for key, leaf in leaves]
    assert parts
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


@pytest.mark.parametrize("start", ["continue", "new"])
def test_adapters_that_peft_made_are_trained_with_kto_and_go_back(
    torch, transformers, peft, base, adapter, run, tmp_path, start
):
    sft = by_peft(torch, transformers, peft, base, adapter)
    close(here(adapter), sft)
    settings = [f"--config.lora.rank={RANK}", f"--config.lora.alpha={ALPHA}", f"--config.lora.start={start}"]
    settings += [f"--config.lora.targets={','.join(TARGETS.values())}", "--config.optimizer.learning_rate=0.02"]
    folder = run(adapter, tmp_path / "run", *settings, "--config.max_steps=1")
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    digest = reference_digest(folder)
    run(adapter, folder, *settings, "--config.max_steps=4")
    assert reference_digest(folder) == digest
    theirs = by_peft(torch, transformers, peft, base, folder / "adapter")
    moved, differ = np.max(np.abs(theirs - sft)), np.max(np.abs(here(folder / "adapter") - theirs))
    print(f"{start}: logits move by {moved:.2g}; those of peft and ours differ by at most {differ:.1e}")
    assert moved > 0.1
    close(here(folder / "adapter"), theirs)
    model, params, _ = load_policy(folder)
    close(our_logits(model, params, TOKENS), theirs)
    close(here(folder / "policy"), theirs)
    ranks = {
        len(leaf) for name, leaf in load_file(folder / "adapter" / "adapter_model.safetensors").items() if "_A" in name
    }
    assert ranks == {RANK if start == "continue" else 2 * RANK}
    close(by_peft(torch, transformers, peft, base, adapter), sft)  # The folder that it began with is as it was.


def assert_writes_as_we_do(torch, model, tokenizer, path):
    """Checks our greedy completions: each token is the model's most likely one, or as likely but for rounding."""
    with open_language_model(str(path)) as opened:
        prompts = encode_prompts(opened.tokenizer, PROMPTS, opened.workers)
        stops = sorted({*opened.tokenizer.stop_ids, *opened.model.config.eos_ids})
        completions = sample(opened.model, opened.params, prompts, GREEDY, eos_id=stops, key=jax.random.key(0))
    for prompt, ours in zip(PROMPTS, completions, strict=True):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*ids, *ours.tolist()]])).logits[0, len(ids) - 1 : -1]
        behind = logits.max(dim=-1).values - logits[range(len(ours)), ours.tolist()]
        assert behind.max() < 1e-3, path


def test_every_export_of_a_run_writes_the_same_in_transformers(torch, transformers, peft, base, run, tmp_path):
    full = run(base, tmp_path / "full", "--config.max_steps=2")
    lora = run(base, tmp_path / "lora", "--config.max_steps=2", "--config.lora.rank=2")
    assert export([f"--run={lora}", f"--to={tmp_path / 'merged'}", "--merge"]) == 0
    assert export([f"--run={full}", f"--to={tmp_path / 'gguf'}", "--gguf=f32"]) == 0
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    opened = {
        full / "policy": (load(full / "policy", dtype=torch.float32), full / "policy"),
        tmp_path / "merged": (load(tmp_path / "merged", dtype=torch.float32), tmp_path / "merged"),
        lora / "adapter": (
            peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), lora / "adapter"),
            lora / "adapter",
        ),
    }
    for path, (model, folder) in opened.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert_writes_as_we_do(torch, model, tokenizer, path)
    # transformers reads no rotary factors from a GGUF file, so its logits are compared through its config.
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = transformers.AutoConfig.from_pretrained(full / "policy")
    model = load(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    assert_writes_as_we_do(torch, model, tokenizer, file)


def test_a_run_with_new_tokens_opens_in_transformers(torch, transformers, base, run, tmp_path):
    settings = ["--config.model.added_tokens=<good>,<bad>", "--config.model.grow_vocab=64"]
    folder = run(base, tmp_path / "run", *settings, "--config.max_steps=2", "--config.optimizer.learning_rate=0.01")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    own = read_config(base).vocab_size
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] == own + 64
    assert tokenizer("<bad>", add_special_tokens=False).input_ids == [len(tokenizer) - 1]
    tokens = np.array([[5, len(tokenizer) - 1, 7, own + 63]])
    close(our_logits(*load_policy(folder)[:2], tokens), their_logits(torch, theirs, tokens))
    # The embedding of the base without the new rows was trained further; the new rows began at its mean.
    before, after = (here_embedding(path) for path in (base, folder / "policy"))
    assert np.abs(after[:own] - before).max() < 0.1
    assert np.abs(after[own:] - before.mean(axis=0)).max() < 0.1


def here_embedding(path):
    return load_file(path / "model.safetensors")["model.embed_tokens.weight"]
