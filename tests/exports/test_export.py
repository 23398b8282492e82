"""Checkpoints of a run exported as models, as adapters, as GGUF files, and to a stand-in for the Hub."""

import base64
import contextlib
import http.server
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from kto_jax.config import ConfigError
from kto_jax.data.tokens.prepare import prepare_tokenizer
from kto_jax.data.tokens.tokenizer import encode_prompts
from kto_jax.export import main as export
from kto_jax.exports.checkpoint import export_checkpoint
from kto_jax.exports.gguf_file import write_gguf
from kto_jax.generate import main as generate
from kto_jax.models.model import Model
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.model_files import find_model
from kto_jax.sampling.complete import complete
from kto_jax.sampling.sample import Sampling
from kto_jax.train import main as train
from tests import ROOT

TINY = ROOT / "configs" / "tiny_model"
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model, with weights of a size that decides greedy text."""
    folder = tmp_path_factory.mktemp("exports")
    model = Model.create(read_config(TINY))
    params = model.init_params(jax.random.key(0), "float32")
    params = jax.tree.map(lambda leaf: leaf * 4, params)  # Else greedy text hangs on the last bits.
    save_hugging_face(folder / "base", model, params, tokenizer_dir=TINY, model_card="")
    return folder / "base"


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Two runs of three steps with a checkpoint of each: all weights, and adapters."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("KTO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "exports_cache"))
        command = ["--config=configs/tiny.py", f"--config.model.path={base}", "--config.model.init=pretrained"]
        command += ["--config.max_steps=3", "--config.evaluation.every=1", "--config.checkpoint.keep=3"]
        command += ["--config.evaluation.max_examples=16", "--config.optimizer.warmup_steps=0"]
        assert train([*command, f"--workdir={folder / 'full'}"]) == 0
        adapters = ["--config.lora.rank=2", "--config.data.holdout=0"]
        assert train([*command, f"--workdir={folder / 'lora'}", *adapters]) == 0
    return folder


def tensors(path):
    files = find_model(str(path))
    params = load_params(Model.create(read_config(files.weights)), files, param_dtype="float32")
    return jax.tree.leaves(params)


def same(one, other, **tolerance):
    for first, second in zip(tensors(one), tensors(other), strict=True):
        np.testing.assert_allclose(first, second, **{"rtol": 0, "atol": 0} | tolerance)


def test_the_last_checkpoint_of_a_run_is_its_policy(runs, tmp_path):
    exported = export_checkpoint(runs / "full", tmp_path / "out")
    assert (exported.step, exported.is_adapter, exported.dtype) == (3, False, "float32")
    same(tmp_path / "out", runs / "full" / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (runs / "full" / "policy" / name).read_bytes()
    assert "the checkpoint after 3 steps" in " ".join((tmp_path / "out" / "README.md").read_text().split())


def test_an_earlier_and_the_best_checkpoint_are_found(runs, tmp_path):
    first = export_checkpoint(runs / "full", step="1")
    assert first.folder == runs / "full" / "exports" / "1" and first.step == 1
    with pytest.raises(AssertionError):
        same(first.folder, runs / "full" / "policy")
    rows = [json.loads(line) for line in (runs / "full" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows}
    assert export_checkpoint(runs / "full", tmp_path / "best", step="best").step == min(losses, key=losses.get)
    with pytest.raises(ConfigError, match=r"--step=7 is no checkpoint of .*Allowed: 1, 2, 3, last, and best"):
        export_checkpoint(runs / "full", step="7")


def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before_it_unless_strict(runs, tmp_path, capfd):
    run = shutil.copytree(runs / "full", tmp_path / "run", ignore=shutil.ignore_patterns("policy", "exports"))
    data = max((run / "checkpoints" / "3" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-2000])
    for strict, code in ((["--strict"], 2), ([], 0)):
        assert export([f"--run={run}", f"--to={tmp_path / 'out'}", *strict]) == code
        assert generate([f"--model={run}", "--prompt=Hi", "--max_new_tokens=2", *strict]) == code
        said = " ".join(capfd.readouterr().err.split())
        assert "3 is damaged: " in said and (("taking the checkpoint of step 2 instead" in said) is not bool(strict))
    assert "the checkpoint after 2 steps" in " ".join((tmp_path / "out" / "README.md").read_text().split())


def test_adapters_are_exported_as_such_or_merged(runs, base, tmp_path, capsys):
    assert export(["--run", str(runs / "lora"), f"--to={tmp_path / 'adapter'}"]) == 0
    assert "--merge exports a whole model" in capsys.readouterr().out
    assert find_model(str(tmp_path / "adapter")).weights == base
    ours, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", runs / "lora/adapter")
    )
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert export(["--run", str(runs / "lora"), f"--to={tmp_path / 'merged'}", "--merge", "--dtype=bfloat16"]) == 0
    assert "in bfloat16; rounding changes a weight by up to 0.0039 of its value" in capsys.readouterr().out
    same(tmp_path / "merged", runs / "lora" / "policy", rtol=2**-8)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_a_gguf_file_is_read_back_with_its_tokenizer(runs, tmp_path, kind, capsys):
    assert export([f"--run={runs / 'full'}", f"--gguf={kind}", f"--to={tmp_path}"]) == 0
    file = tmp_path / f"full-3-{kind}.gguf"
    assert str(file) in capsys.readouterr().out
    policy = runs / "full" / "policy"
    same(file, policy, rtol={"f32": 0, "bf16": 2**-8, "q8_0": 0}[kind], atol={"f32": 0, "bf16": 0, "q8_0": 0.02}[kind])
    prompts = ["name a film", [{"role": "user", "content": "Hi, <|im_end|>"}]]
    ids = [
        [
            found.tolist()
            for found in encode_prompts(prepare_tokenizer(path, tmp_path / name, chat_template="auto"), prompts)
        ]
        for name, path in (("ours", file), ("theirs", policy))
    ]
    assert ids[0] == ids[1]
    if kind == "f32":
        texts = [complete(str(path), prompts, GREEDY) for path in (file, policy)]
        assert [one.text for one in texts[0]] == [one.text for one in texts[1]]


def rewritten(folder, target, change):
    shutil.copytree(folder, target)
    definition = json.loads((target / "tokenizer.json").read_text())
    change(definition)
    (target / "tokenizer.json").write_text(json.dumps(definition))
    return target


def test_what_has_no_place_in_a_gguf_file_is_refused(runs, tmp_path):
    policy = runs / "full" / "policy"
    other = rewritten(policy, tmp_path / "other", lambda found: found["pre_tokenizer"].update(add_prefix_space=True))
    with pytest.raises(ConfigError, match="Byte-level BPE as in GPT-2"):
        write_gguf(tmp_path / "x.gguf", other, "f16", name="x")
    config = json.loads((policy / "config.json").read_text()) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
    }
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"family 'qwen2' with rope_scaling=.*llama3.*, where llama.cpp takes None"):
        write_gguf(tmp_path / "x.gguf", other, "f16", name="x")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("flags, message", [
    (["--run=nowhere"], "--run=nowhere is no folder"), ([], "--run= is no folder"),
    (["--run=RUN", "--gguf=f16", "--dtype=float32"], "--dtype=float32 has no use with --gguf=f16"),
    (["--run=RUN", "--push=org/name"], "without the environment variable HF_TOKEN"),
    (["--run=configs"], "is not the folder of a run"),
])  # fmt: skip
def test_flags_that_cannot_be_used_are_refused(runs, monkeypatch, capsys, flags, message, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(ROOT)
    flags = [flag.replace("RUN", str(runs / "full")) for flag in flags]
    assert export([*flags, f"--to={tmp_path / 'out'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@contextlib.contextmanager
def serve_uploads():
    """A stand-in for the Hub that takes commits; yields its address and what it was sent."""
    seen = {"files": {}, "tokens": set(), "repositories": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen["tokens"].add(self.headers["Authorization"])
            answer = {}
            if self.path == "/api/repos/create":
                seen["repositories"].append(json.loads(body))
                answer = {"url": f"{url}/org/name"}
            elif "/preupload/" in self.path:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        seen["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{url}/org/name/commit/abc", "commitOid": "abc", "success": True}
            self.reply(answer)

        def do_GET(self):
            self.reply({"id": "org/name", "sha": "abc", "siblings": []})

        def reply(self, answer):
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield url, seen
        finally:
            server.shutdown()
            thread.join()


def test_a_folder_is_uploaded_with_the_token_of_the_environment(runs, tmp_path, monkeypatch, capsys):
    with serve_uploads() as (url, seen):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert export([f"--run={runs / 'lora'}", f"--to={tmp_path / 'out'}", "--push=org/name"]) == 0
    out = capsys.readouterr()
    assert f"uploaded to {url}/org/name/commit/abc" in out.out and "hf_secret" not in out.out + out.err
    assert seen["tokens"] == {"Bearer hf_secret"}
    assert seen["repositories"] == [{"name": "name", "organization": "org", "visibility": "private"}]
    for path in (tmp_path / "out").iterdir():
        assert seen["files"][path.name] == path.read_bytes()
