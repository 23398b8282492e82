"""The weights of a directory that bitsandbytes quantised to four bits, dequantised while they are read.

Beside a matrix of packed codes, U8 [out · in / 2, 1], stand tensors with its name and an ending: absmax (a scale for
each block), quant_map (the number of each code), and quant_state.bitsandbytes__nf4 or __fp4, JSON with shape and block
size. If the scales are quantised too ("double quantisation"), absmax is U8, and nested_absmax, nested_quant_map and
nested_offset dequantise it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.models.four_bits import BLOCK, NF4_LEVELS
from kto_jax.models.weights.safetensors_files import SafetensorsWeights

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = ("F64", "F32", "F16", "BF16", "U8")


class BitsAndBytesWeights:
    """Weights of which some are in four bits.

    Attributes:
      shapes: shape of every tensor by name, of quantised matrices [out, in].
    """

    def __init__(self, directory: Path) -> None:
        """Opens a directory's safetensors and reads the description of each matrix.

        Raises:
          ConfigError: as `SafetensorsWeights`; or a description is damaged, or a part of a matrix is missing.
        """
        self._directory, self._stored = directory, SafetensorsWeights(directory, dtypes=_DTYPES)
        shapes = self._stored.shapes
        self._states = {name.partition(_STATE)[0]: self._read_state(name, shapes) for name in shapes if _STATE in name}
        parts = tuple(f"{name}." for name in self._states)
        plain = {name: shape for name, shape in shapes.items() if not name.startswith(parts)} if parts else shapes
        self.shapes = plain | {name: tuple(state["shape"]) for name, state in self._states.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part `index` of a tensor; of a quantised matrix the bytes of its rows, dequantised to float32."""
        state = self._states.get(name)
        if state is None:
            return self._stored.read(name, index)
        num_rows, size_in = state["shape"]
        first_row, last_row, _ = index[0].indices(num_rows)
        start, stop, block = first_row * size_in, last_row * size_in, state["blocksize"]
        packed = self._stored.read(name, (slice(start // 2, -(-stop // 2)), slice(None))).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[start % 2 :][: stop - start]
        scales = self._scales(name, state, start // block, -(-stop // block))
        values = self._whole(f"{name}.quant_map")[codes] * scales[np.arange(start, stop) // block - start // block]
        return values.reshape(-1, size_in)[(slice(None), *index[1:])]

    def are_nf4(self) -> bool:
        """Whether our nf4 holds all weights exactly: layers' matrices are nf4 in blocks of 64, the rest bfloat16."""
        states = self._states.values()
        dtypes = {self._stored.dtypes[name] for name in self.shapes if name not in self._states}
        matrices = {name for name, shape in self.shapes.items() if len(shape) == 2 and ".layers." in name}
        return (
            dtypes == {"BF16"}
            and matrices == self._states.keys()
            and all(state["blocksize"] == BLOCK and state["shape"][1] % BLOCK == 0 for state in states)
            and all(
                np.array_equal(self._whole(f"{name}.quant_map"), np.array(NF4_LEVELS, np.float32))
                for name in self._states
            )
        )

    def _scales(self, name: str, state: Mapping[str, Any], first: int, last: int) -> np.ndarray:
        stored = self._stored.read(f"{name}.absmax", (slice(first, last),))
        if stored.dtype != np.uint8:
            return stored
        nested, block = self._whole(f"{name}.nested_absmax"), state["nested_blocksize"]
        levels = self._whole(f"{name}.nested_quant_map")[stored] * nested[np.arange(first, last) // block]
        return np.asarray(levels + np.float32(state["nested_offset"]), np.float32)

    def _whole(self, name: str) -> np.ndarray:
        return np.asarray(self._stored.read(name, (slice(None),)), np.float32)

    def _read_state(self, stored: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The description of a matrix, checked against its parts."""
        name = stored.partition(_STATE)[0]
        try:
            state = json.loads(self._stored.read(stored, (slice(None),)).tobytes())
            size_out, size_in = (int(size) for size in state["shape"])
            num_blocks, is_nested = -(-size_out * size_in // int(state["blocksize"])), "nested_blocksize" in state
            expected = {"": (-(-size_out * size_in // 2), 1), ".absmax": (num_blocks,), ".quant_map": (16,)}
            if is_nested:
                num_nested = -(-num_blocks // int(state["nested_blocksize"]))
                expected |= {".nested_absmax": (num_nested,), ".nested_quant_map": (256,)}
                math.isfinite(state["nested_offset"])
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise ConfigError(
                f"{self._directory}: {stored} does not describe a matrix ({type(error).__name__}: {error}). It must be "
                "JSON with shape and blocksize, as bitsandbytes writes it. Download the model again."
            ) from error
        wrong = [
            f"{name}{part} {shapes.get(name + part, 'missing')} (expected {shape})"
            for part, shape in expected.items()
            if shapes.get(name + part) != shape
        ]
        if wrong or (self._stored.dtypes[f"{name}.absmax"] == "U8") != is_nested:
            what = "; ".join(wrong) or f"{name}.absmax of another dtype than its description says"
            raise ConfigError(
                f"{self._directory} holds {what}. A matrix in four bits has all of its parts. Download the model again."
            )
        return dict(state)
