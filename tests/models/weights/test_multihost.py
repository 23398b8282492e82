import json
import os
import socket
import subprocess
import sys

import safetensors.numpy

from tests import COMPILER_FLAGS
from tests.models.weights.directories import draw_weights, write_model

WORKER = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
import json
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.model import Model
from kto_jax.models.weights.safetensors_files import SafetensorsWeights

directory = Path(sys.argv[3])
read, sizes = SafetensorsWeights.read, []
def record(self, name, index):
    part = read(self, name, index)
    sizes.append(part.size)
    return part
SafetensorsWeights.read = record
model = Model.create(read_config(directory / "model"))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
spread = lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp"))
shardings = jax.tree.map(spread, model.abstract_params("float32"))
params = load_params(model, directory / "model", param_dtype="float32", shardings=shardings)
save_hugging_face(directory / "out", model, params, tokenizer_dir=None, model_card="", max_shard_bytes=20000)
assert (directory / "out" / "config.json").exists()
(directory / f"read{sys.argv[2]}.json").write_text(json.dumps([sum(sizes), model.config.num_params()]))
"""


def test_two_processes_read_half_each_and_write_one_whole_model(config, tmp_path):
    weights = draw_weights(config)
    write_model(tmp_path / "model", config, weights)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"{COMPILER_FLAGS} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(process), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors for _, errors in results)
    # Through files, because the transport's own lines mix with the workers' standard output.
    for process in range(2):
        num_read, num_params = json.loads((tmp_path / f"read{process}.json").read_text())
        assert num_read == num_params // 2
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= safetensors.numpy.load_file(file)
    assert written.keys() == weights.keys()
    assert all((written[name] == values).all() for name, values in weights.items())
