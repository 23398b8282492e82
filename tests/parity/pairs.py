"""Random models as transformers made and saved them, the same as they are read here, and how far they differ."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from kto_jax.models.families.multimodal import find_multimodal, text_name
from kto_jax.models.model import Model
from kto_jax.models.rope import LengthDependent
from kto_jax.models.weights.export import save_hugging_face
from kto_jax.models.weights.load import load_params, read_config
from kto_jax.models.weights.tensors import expected_tensors
from tests.models.families.family_files import FILES, LENGTHS, MULTIMODAL_FILES

ROW = 32
ALL_FILES = FILES | MULTIMODAL_FILES


def largest(ours, theirs):
    """The largest difference, as a share of 1 plus the value: below 1e-4 it passes rtol=1e-4 and atol=1e-4."""
    return float(np.max(np.abs(np.asarray(ours) - theirs) / (1 + np.abs(theirs))))


def as_stored(tensors, name):
    """Tensors by the names of files, where every expert has its own; in transformers' models a layer has one."""
    stored = {}
    for key, values in tensors.items():
        block, found, matrix = key.partition(".mlp.experts.")
        if name == "mixtral":
            key, block = key.replace(".mlp.", ".block_sparse_moe."), block + ".block_sparse_moe.experts"
            names = {"gate": "w1", "up": "w3", "down": "w2"}
        else:
            block, names = block + ".mlp.experts", {part: f"{part}_proj" for part in ("gate", "up", "down")}
        if not found:
            stored[key] = values
            continue
        for expert, whole in enumerate(values):
            parts = {"down": whole}
            if matrix == "gate_up_proj":
                parts = dict(zip(("gate", "up"), np.split(whole, 2), strict=True))
            stored |= {f"{block}.{expert}.{names[part]}.weight": each for part, each in parts.items()}
    return stored


class Pair:
    """A random model as transformers made and saved it, the same as it was read here, and what is asked of both.

    Attention is eager: transformers' sdpa leaves out soft-caps.
    """

    def __init__(self, torch, transformers, name, directory):
        self.torch, self.transformers, self.name, self.directory = torch, transformers, name, directory
        (directory / "written").mkdir()
        (directory / "written" / "config.json").write_text(json.dumps(ALL_FILES[name]))
        config = transformers.AutoConfig.from_pretrained(directory / "written")
        self.is_multimodal = find_multimodal(ALL_FILES[name]) is not None
        auto = transformers.AutoModelForImageTextToText if self.is_multimodal else transformers.AutoModelForCausalLM
        self.theirs = auto.from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in self.theirs.parameters():  # Norms and biases as well.
            tensor.data.normal_(0.0, 0.3, generator=generator)
        self.path = directory / "theirs"
        self.theirs.save_pretrained(self.path)
        self.model = Model.create(read_config(self.path), remat="full")
        self.params = load_params(self.model, self.path, param_dtype="float32")
        random = np.random.default_rng(0)
        # 0 pads batches, and torch gives its embedding no gradient.
        self.sequences = [random.integers(1, 64, length) for length in LENGTHS]

    @functools.cached_property
    def expected(self):
        """transformers' logits of each sequence by itself."""
        with self.torch.no_grad():
            return [self.theirs(self.torch.tensor(tokens[None])).logits[0].numpy() for tokens in self.sequences]

    @functools.cached_property
    def packed(self):
        """Logits of one packed row, and the gradient of the sum of its tokens' log-probabilities."""
        padding = [0] * (ROW - sum(LENGTHS))
        tokens = np.array([[*np.concatenate(self.sequences), *padding]])
        segments = np.array([[1] * LENGTHS[0] + [2] * LENGTHS[1] + padding])
        positions = np.array([[*range(LENGTHS[0]), *range(LENGTHS[1]), *padding]])
        targets = np.roll(tokens, -1, axis=1)
        counts = (segments > 0) & (segments == np.roll(segments, -1, axis=1))

        def total(params):
            hidden = self.model.hidden_states(params, tokens, segments, positions)
            logps = self.model.token_logps(params, hidden, jnp.asarray(targets))
            return jnp.sum(jnp.where(counts, logps, 0)), self.model.logits(params, hidden)

        (_, logits), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(self.params)
        first, second, _ = np.split(np.asarray(logits)[0], np.cumsum(LENGTHS))
        return (first, second), gradient

    def dense_difference(self):
        """Of logits, each sequence in a row by itself."""
        found = []
        for tokens, theirs in zip(self.sequences, self.expected, strict=True):
            positions, segments = np.arange(len(tokens))[None], np.ones((1, len(tokens)), np.int32)
            hidden = jax.jit(self.model.hidden_states)(self.params, tokens[None], segments, positions)
            found.append(largest(self.model.logits(self.params, hidden)[0], theirs))
        return max(found)

    def packed_difference(self):
        """Of logits, both sequences in one row."""
        return max(largest(ours, theirs) for ours, theirs in zip(self.packed[0], self.expected, strict=True))

    def decoded_difference(self):
        """Of logits, token by token through the cache; None if the cache cannot hold the longest sequence."""
        scaling = self.model.config.rope_scaling
        fits = [
            pair for pair in zip(self.sequences, self.expected, strict=True)
            if not isinstance(scaling, LengthDependent) or len(pair[0]) <= scaling.original_max_length
        ]  # fmt: skip
        decode, found = jax.jit(self.model.decode), []
        for tokens, theirs in fits:
            cache = self.model.init_cache(1, len(tokens))
            for place, token in enumerate(tokens):
                hidden, cache = decode(self.params, cache, np.array([[token]]), np.array([[place]]))
                found.append(largest(self.model.logits(self.params, hidden[0, 0]), theirs[place]))
        return max(found)

    def gradient_difference(self):
        """Of the gradient of every tensor, as a share of the tensor's largest."""
        self.theirs.zero_grad()
        for sequence in self.sequences:
            tokens = self.torch.tensor(sequence[None])
            logps = self.torch.log_softmax(self.theirs(tokens).logits[:, :-1], dim=-1)
            logps.gather(-1, tokens[:, 1:, None]).sum().backward()
        expected = {}
        for name, tensor in self.theirs.named_parameters():
            if (own := text_name(name)) is not None:
                expected[own] = tensor.grad.numpy()
        expected = as_stored(expected, self.name)
        gradient = {
            ".".join(part.key for part in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.packed[1])
        }
        found = []
        for name, tensor in expected_tensors(self.model.config).items():
            parts = [gradient[part.parameter] for part in tensor.parts]
            ours = tensor.join([part[tensor.place] for part in parts])
            other = "lm_head.weight" if name == "embed_out.weight" else name  # transformers renames it when it loads
            theirs = expected.pop(other)
            found.append(float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))))
        assert not expected, f"no gradient here of {', '.join(expected)}"
        return max(found)

    def export(self, name="ours"):
        """Writes the model here, once."""
        folder = self.directory / name
        if not folder.exists():
            save_hugging_face(folder, self.model, self.params, tokenizer_dir=None, model_card="")
        return folder

    @functools.cached_property
    def read_back(self):
        """What transformers reads of our export, and its report."""
        return self.transformers.AutoModelForCausalLM.from_pretrained(
            self.export(), dtype=self.torch.float32, attn_implementation="eager", output_loading_info=True
        )

    def exported_difference(self):
        """Of logits, after an export that transformers reads."""
        back, _ = self.read_back
        with self.torch.no_grad():
            return max(
                largest(back(self.torch.tensor(tokens[None])).logits[0].numpy(), theirs)
                for tokens, theirs in zip(self.sequences, self.expected, strict=True)
            )
