"""TPU topologies by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from kto_jax.config import ConfigError
from kto_jax.devices.chips import CHIPS, Chip

LOCAL = "local"


# What `get_topology_desc` is told beside the name.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>[a-z0-9]+):(?P<size>\d+(?:x\d+)+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was given.
      devices: of all slices; those of a topology that is not here can be compiled for, nothing else.
      chip: what one chip can do; None for the devices of this machine.
      num_slices: how many slices are joined by the data center network.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None = None
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices; of this machine, its devices."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def parse_topology(name: str) -> tuple[str, tuple[int, ...], int]:
    """The chip, the size of a slice and the number of slices of a name such as v5p:4x4x4 or 2*v5e:16x16.

    Raises:
      ConfigError: the name is of no known form or chip.
    """
    match = _NAME.fullmatch(name)
    chip = match and CHIPS.get(match["chip"])
    size = tuple(map(int, match["size"].split("x"))) if match else ()
    num_slices = int(match["slices"] or 1) if match else 0
    if match is None or chip is None or len(size) != chip.num_dims or min(*size, num_slices) < 1:
        two = ", ".join(chip for chip, figures in CHIPS.items() if figures.num_dims == 2)
        three = ", ".join(chip for chip, figures in CHIPS.items() if figures.num_dims == 3)
        raise ConfigError(
            f"--topology={name} is not known. Allowed: local; of {two} two dimensions, such as v5e:4x4; of {three} "
            "three, such as v5p:4x4x4; before either N* for N slices, such as 2*v5e:16x16. Set --topology."
        )
    return match["chip"], size, num_slices


def open_topology(name: str) -> Topology:
    """The devices of a topology, described by libtpu without one of them being there; or those of this machine.

    Raises:
      ConfigError: the name is not known, libtpu is not installed, or there is no such slice.
    """
    if name == LOCAL:
        return Topology(name, tuple(jax.devices()))
    kind, size, num_slices = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler, and libtpu is not installed. It is the extra [plan]; without "
            'it, --topology=local plans for the devices here. Run `pip install "jax[tpu]"`.'
        )
    _stay_away_from_hardware()
    chip = CHIPS[kind]
    options = dict(_OPTIONS.get(kind, {}))
    if num_slices > 1:
        options["num_slices"] = num_slices
    three = (*size, 1, 1)[:3]
    if three == (1, 1, 1):
        options["chips_per_host_bounds"] = three
    elif chip.num_dims == 3 and all(length % 4 == 0 for length in size):
        # Whole cubes of 4x4x4 are closed to a torus by optical switches; libtpu closes 16x16 by itself.
        options["wrap"] = (True, True, True)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name.split("*")[-1], **options)
    except Exception as error:  # The runtime's own error types are no part of its interface.
        raise ConfigError(
            f"--topology={name} is no slice that the TPU compiler knows: {str(error).splitlines()[0]}. Allowed: sizes "
            "that its hosts of 4 chips (2x2) can make up, such as 2x2, 2x4, 4x4, 16x16, 2x2x1, 4x4x4. Set --topology."
        ) from None
    return Topology(name, tuple(description.devices), chip, num_slices)


def _stay_away_from_hardware() -> None:
    """Lets libtpu compile without asking a metadata server or a chip; what is set already stays."""
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        # One process at a time may hold the chips, and this one never will.
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        # Without these it complains on standard error of what it did not find out.
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
