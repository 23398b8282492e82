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


# Further arguments of `get_topology_desc`.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}
_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>[a-z0-9]+):(?P<size>\d+(?:x\d+)+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given.
      devices: of all slices. Those of a described topology can only be compiled for.
      chip: published figures of a chip; None for the devices of this machine.
      num_slices: slices joined by the data center network.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None = None
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Chips of all slices; the number of devices for this machine."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def parse_topology(name: str) -> tuple[str, tuple[int, ...], int]:
    """Parses a name such as v5p:4x4x4 or 2*v5e:16x16 into chip, size of a slice and number of slices.

    Raises:
      ConfigError: the name has another form, or names an unknown chip.
    """
    match = _NAME.fullmatch(name)
    chip = match and CHIPS.get(match["chip"])
    size = tuple(map(int, match["size"].split("x"))) if match else ()
    num_slices = int(match["slices"] or 1) if match else 0
    if match is None or chip is None or len(size) != chip.num_dims or min(*size, num_slices) < 1:
        two = ", ".join(chip for chip, figures in CHIPS.items() if figures.num_dims == 2)
        three = ", ".join(chip for chip, figures in CHIPS.items() if figures.num_dims == 3)
        raise ConfigError(
            f"--topology={name} is not known. Allowed: local; {two} with two dimensions, such as v5e:4x4; {three} with "
            "three, such as v5p:4x4x4; either with N* in front for N slices, such as 2*v5e:16x16. Set --topology."
        )
    return match["chip"], size, num_slices


def open_topology(name: str) -> Topology:
    """The devices of a topology, which libtpu describes without hardware; or those of this machine.

    Raises:
      ConfigError: the name is not known, libtpu is not installed, or there is no such slice.
    """
    if name == LOCAL:
        return Topology(name, tuple(jax.devices()))
    kind, size, num_slices = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler, and libtpu is not installed (extra [plan]). Without it, "
            '--topology=local plans for the devices of this machine. Run `pip install "jax[tpu]"`.'
        )
    _compile_without_hardware()
    chip = CHIPS[kind]
    options = dict(_OPTIONS.get(kind, {}))
    if num_slices > 1:
        options["num_slices"] = num_slices
    three = (*size, 1, 1)[:3]
    if three == (1, 1, 1):
        options["chips_per_host_bounds"] = three
    elif chip.num_dims == 3 and all(length % 4 == 0 for length in size):
        # Optical switches close cubes of 4x4x4 to a torus; libtpu wraps 16x16 by default.
        options["wrap"] = (True, True, True)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name.split("*")[-1], **options)
    except Exception as error:  # The runtime's error types are not public.
        raise ConfigError(
            f"--topology={name} is no slice that the TPU compiler knows: {str(error).splitlines()[0]}. Allowed: sizes "
            "made of hosts of 4 chips (2x2), such as 2x2, 2x4, 4x4, 16x16, 2x2x1, 4x4x4. Set --topology."
        ) from None
    return Topology(name, tuple(description.devices), chip, num_slices)


def _compile_without_hardware() -> None:
    """Lets libtpu compile without a metadata server or a chip; variables that are already set stay."""
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        # One process at a time may hold the chips, which this one never does.
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        # Without these it prints warnings on standard error.
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
