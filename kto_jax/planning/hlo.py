"""Reads compiled programs: their collectives with the bytes sent, and the memory that a refused program needs."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{\s*$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_PRODUCTS = {"call", "conditional", "convolution", "dot", "sort", "while"}
"""Instructions that take time."""
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
"""Custom calls that compute nothing."""
_SMALL = 2**16
"""Bytes of the result of a fusion up to which it takes no time worth counting: loop counters, norms."""
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    re.compile(r"Used (?P<needed>[\d.]+)(?P<unit>[KMGT]?) of (?P<free>[\d.]+)(?P<free_unit>[KMGT]?) hbm"),
    re.compile(
        r"required for HLO temporaries \((?P<needed>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM "
        r"\((?P<free>[\d.]+)(?P<free_unit>[KMGT]?)\)"
    ),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a compiled program.

    Attributes:
      kind: one of KINDS.
      loops: trip count of each loop around it, outermost first; None if it is known only at run time.
      num_devices: devices per group; slices, if it is between slices.
      payload: bytes of the gathered or reduced array before each device keeps its part.
      crosses_slices: whether it uses the network between slices.
      overlaps: whether the program computes while it runs; the device waits for any other.
    """

    kind: str
    loops: tuple[int | None, ...]
    num_devices: int
    payload: int
    crosses_slices: bool
    overlaps: bool = False

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device must send at least, whichever algorithm is used."""
        share = (self.num_devices - 1) / self.num_devices
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)

    def times(self, unknown: int) -> int:
        """How often it runs, if loops of unknown trip count run `unknown` times."""
        return math.prod(unknown if trips is None else trips for trips in self.loops)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    result: str
    rest: str
    calls: tuple[str, ...]
    is_root: bool


def find_collectives(text: str, *, num_devices: int, num_slices: int = 1) -> list[Collective]:
    """Finds the collectives in a program's text, each with the loops that it runs in.

    The TPU compiler spreads a collective over several fusions with one `chain_id`, which count once. An all-reduce in a
    computation named all-reduce-scatter is a reduce-scatter: each device keeps a part of it. A collective overlaps with
    computation if it is spread over fusions, or is asynchronous (its instruction ends in -start) and the schedule
    computes before it ends.

    Args:
      text: `compiled.as_text()`.
      num_devices: devices that the program is for.
      num_slices: slices that they form, all of one size; the program is that of one slice.
    """
    entry, computations = _read(text)
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    # A computation that a program runs, the loops around it, and whether the program computes while it runs.
    pending: list[tuple[str, tuple[int | None, ...], bool]] = [(entry, (), False)]
    while pending:
        name, loops, overlaps = pending.pop()
        for own_name, instruction in computations.get(name, {}).items():
            is_start = instruction.opcode.endswith("-start")
            meanwhile = overlaps or (is_start and _computes_meanwhile(own_name, computations[name]))
            chain = _first(r'chain_id="(\d+)"', instruction.rest), _first(r"channel_id=(\d+)", instruction.rest)
            if not chain[0] or chain not in seen:
                seen.add(chain)
                found += _collective(instruction, name, loops, num_devices // num_slices, num_slices, meanwhile)
            inside = loops
            if instruction.opcode == "while":
                inside = (*loops, _trip_count(instruction, computations))
            if not instruction.opcode.endswith(("-done", "-update")):
                pending += [(called, inside, meanwhile) for called in instruction.calls]
    return found


def _computes_meanwhile(name: str, computation: dict[str, _Instruction]) -> bool:
    """Whether the schedule computes between the start of an asynchronous instruction and its end.

    If it does not end in its computation, which is then the body of a loop, it ends in the loop's next round: at the
    first end there that has no start.
    """
    names = list(computation)
    place, starts = names.index(name), {name}
    for other in names[place + 1 :]:
        instruction = computation[other]
        if instruction.opcode.endswith(("-done", "-update")) and starts & set(_operands(instruction)):
            if instruction.opcode.endswith("-done"):
                return False
            starts.add(other)
        elif _takes_time(instruction):
            return True
    for other in names[:place]:
        instruction = computation[other]
        if instruction.opcode.endswith("-done") and not any(
            computation[start].opcode.endswith(("-start", "-update"))
            for start in _operands(instruction)
            if start in computation
        ):
            return False
        if _takes_time(instruction):
            return True
    return False


def _takes_time(instruction: _Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return _first(r'custom_call_target="([^"]*)"', instruction.rest) not in _FREE_TARGETS
    return instruction.opcode in _PRODUCTS or (instruction.opcode == "fusion" and _bytes(instruction.result) > _SMALL)


def _collective(
    instruction: _Instruction,
    computation: str,
    loops: tuple[int | None, ...],
    num_devices: int,
    num_slices: int,
    meanwhile: bool,
) -> list[Collective]:
    """The collective of an instruction, if it is one: within a slice or between slices."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and (transfer := _first(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)):
        # Between slices each device exchanges its own part through the host.
        kind = transfer.lower().replace("_", "-")
        whole = num_slices if kind == "all-gather" else 1
        return [Collective(kind, loops, num_slices, _bytes(_parts(instruction.result)[0]) * whole, True, True)]
    if kind not in KINDS:
        return []
    size = _group_size(instruction.rest, num_devices)
    payload = _payload(kind, instruction, size)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    overlaps = meanwhile or "chain_id=" in instruction.rest
    return [Collective(kind, loops, size, payload, False, overlaps)] if size > 1 else []


def summarize(collectives: list[Collective], *, unknown: int) -> list[dict]:
    """Adds up collectives by kind, loops, whether they cross slices and whether they overlap, the most bytes first.

    Args:
      collectives: from `find_collectives`.
      unknown: assumed trip count of loops for which it is unknown.

    Returns:
      Rows of kind, loops (text), crosses_slices, overlaps, places (in the program), times (per step) and bytes (sent
      by each device per step).
    """
    totals: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for one in collectives:
        loops = " × ".join("microbatches" if trips is None else str(trips) for trips in one.loops)
        total = totals[one.kind, loops, one.crosses_slices, one.overlaps]
        times = one.times(unknown)
        total[0] += 1
        total[1] += times
        total[2] += times * one.bytes_sent
    names = ("kind", "loops", "crosses_slices", "overlaps", "places", "times", "bytes")
    rows: list[dict[str, Any]] = [dict(zip(names, (*key, *total), strict=True)) for key, total in totals.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def refused_bytes(message: str) -> tuple[int, int] | None:
    """Bytes per device that a refused program needs, and that there are; None for any other message."""
    for pattern in _REFUSALS:
        if match := pattern.search(message):
            needed = float(match["needed"]) * _SIZES[match["unit"]]
            return round(needed), round(float(match["free"]) * _SIZES[match["free_unit"]])
    return None


def _read(text: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
    """The name of the entry computation, and the instructions of each computation by name."""
    entry = ""
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (head := _COMPUTATION.match(line)):
            current = computations.setdefault(head["name"], {})
            entry = head["name"] if head["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            calls = tuple(name for pair in _CALLED.findall(found["rest"]) for name in _names(*pair))
            current[found["name"]] = _Instruction(
                found["opcode"], found["type"], found["rest"], calls, bool(found["root"])
            )
    return entry, computations


def _names(single: str, several: str) -> Iterator[str]:
    yield from (name.strip().lstrip("%") for name in (single or several).split(",") if name.strip())


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _trip_count(loop: _Instruction, computations: dict[str, dict[str, _Instruction]]) -> int | None:
    """Trip count of a loop: the compiler's note, or the limit of its counter, which runs from 0 to a constant."""
    if noted := _first(r'known_trip_count":\s*\{"n":"(\d+)"', loop.rest):
        return int(noted)
    condition = computations.get(_first(r"condition=%?([\w.\-]+)", loop.rest), {})
    body = computations.get(_first(r"body=%?([\w.\-]+)", loop.rest), {})
    for instruction in condition.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            counter, limit = (condition.get(name) for name in _operands(instruction))
            if counter and limit and limit.opcode == "constant":
                place = int(_first(r"index=(\d+)", counter.rest) or 0)
                return math.ceil(_constant(limit) / _step(body, place))
    return None


def _step(body: dict[str, _Instruction], place: int) -> int:
    """Increment of a loop's counter: 2 or more for loops that the compiler has unrolled."""
    root = next((instruction for instruction in body.values() if instruction.is_root), None)
    if root is None or root.opcode != "tuple":
        return 1
    grown = body.get(_operands(root)[place])
    parts = [body.get(name) for name in _operands(grown)] if grown and grown.opcode == "add" else []
    return next((_constant(part) for part in parts if part and part.opcode == "constant"), 1)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _constant(instruction: _Instruction) -> int:
    return int(_first(r"^(\d+)", instruction.rest) or 1)


def _payload(kind: str, instruction: _Instruction, num_devices: int) -> int:
    """Bytes of the array that a collective gathers or reduces; see `Collective.payload`."""
    result = instruction.result
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute", "reduce-scatter"):
        # The result of an asynchronous one is a tuple of operand and result.
        sizes = sorted(_bytes(part) for part in _parts(result)[:2])
        return sizes[0] * num_devices if kind == "reduce-scatter" else sizes[-1]
    return _bytes(result) * (num_devices if kind == "reduce-scatter" else 1)


def _parts(result: str) -> list[str]:
    """The elements of a tuple type, one level deep."""
    parts, depth, start = [], 0, 1
    for place, character in enumerate(result):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(result[start:place])
            start = place + 1
    return parts


def _bytes(result: str) -> int:
    """Bytes of all arrays in a type."""
    bits = 0
    for dtype, shape in _ARRAY.findall(result):
        width = _BITS.get(dtype) or int(_first(r"(\d+)$", dtype) or 0)
        bits += width * math.prod(int(size) for size in shape.split(",") if size)
    return bits // 8


def _group_size(rest: str, num_devices: int) -> int:
    """Number of devices in each group of a collective."""
    if "source_target_pairs={{" in rest:
        return 2
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        # A mesh such as 'a'=4,'b'=8 and the axes of a group: 'a', or 'b':(2)2, a part of b with 2 devices.
        axes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        chosen = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or axes[axis]) for axis, part in chosen)
    if match := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    return num_devices
