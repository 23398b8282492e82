"""SHA256SUMS: the digests of a folder's files, written with the folder and compared when it is read.

The format is that of coreutils: `sha256sum --check SHA256SUMS` in the folder compares the files too. An index, an
exported model, exported adapters and the folder of a run have one. README.md is left out, because people edit it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from kto_jax.config import ConfigError
from kto_jax.storage.atomic import write_text
from kto_jax.storage.digests import sha256

SUMS = "SHA256SUMS"
_LEFT_OUT = (SUMS, "README.md")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")


def write_sums(folder: Path, names: Iterable[str] = ()) -> None:
    """Writes the digests of files of a folder that nothing else writes to.

    Args:
      folder: the folder.
      names: paths inside it; by default all of its files.

    Raises:
      OSError: a file cannot be read or written.
    """
    names = list(names) or [path.name for path in folder.iterdir() if path.is_file() and path.name not in _LEFT_OUT]
    names.sort()
    lines = [f"{digest}  {name}\n" for name, digest in zip(names, _digests(folder, names), strict=True)]
    write_text(folder / SUMS, "".join(lines))


def has_sums(folder: Path) -> bool:
    """Whether a folder was written with digests; versions without them wrote none."""
    return (folder / SUMS).is_file()


def damage_of(folder: Path, is_read: Callable[[str], bool] = lambda name: True, *, partial: bool = False) -> str:
    """What is wrong with a folder, such as "model.safetensors differs from SHA256SUMS"; "" if nothing is.

    A folder without SHA256SUMS counts as whole, see `has_sums`.

    Args:
      folder: the folder.
      is_read: whether a file is compared; each is read once.
      partial: whether files may be missing, and lines of SHA256SUMS have another format: a model of the Hub is fetched
        in part, and may be anybody's.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS} cannot be read ({error})"
    matches = [_LINE.fullmatch(line) for line in lines]
    if (None in matches or not matches) and not partial:
        return f"{SUMS} is damaged in line {matches.index(None) + 1 if matches else 1}"
    recorded = {match[2]: match[1] for match in matches if match and is_read(match[2])}
    if outside := [name for name in recorded if Path(name).is_absolute() or ".." in Path(name).parts]:
        return f"{SUMS} names {outside[0]!r}, which is no file of the folder"
    if partial:
        recorded = {name: digest for name, digest in recorded.items() if (folder / name).is_file()}
    if missing := [name for name in recorded if not (folder / name).is_file()]:
        return f"{_listed(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    try:
        found = dict(zip(recorded, _digests(folder, recorded), strict=True))
    except OSError as error:
        return f"a file cannot be read ({error})"
    if wrong := [name for name in recorded if found[name] != recorded[name]]:
        return f"{_listed(wrong)} {'differ' if len(wrong) > 1 else 'differs'} from {SUMS}"
    return ""


def check_export(folder: Path, *, weights: bool) -> None:
    """Refuses an exported model, or adapters, whose files differ from their digests; reads unchanged ones once.

    Args:
      folder: the folder, also one in the Hub's cache; one without SHA256SUMS is not checked.
      weights: whether to compare the weights, or all other files.

    Raises:
      ConfigError: naming the files.
    """
    if not has_sums(folder) or not (damage := _damage_once(folder, weights, _identity(folder))):
        return
    if _is_of_hub(folder):
        raise ConfigError(
            f"{folder}, which was fetched from the Hub, is damaged: {damage}. Its files must be those that {SUMS} of "
            f"its repository names. Remove {folder.parent.parent} and start again; if they still differ, choose "
            "another revision."
        )
    raise ConfigError(
        f"{folder} is damaged: {damage}. Its files must be those that were exported. Copy or export it again; if "
        f"you have changed them yourself, remove {folder / SUMS}."
    )


def _is_of_hub(folder: Path) -> bool:
    """Whether a folder is a commit in the Hub's own cache."""
    return folder.parent.name == "snapshots"


@functools.lru_cache(maxsize=64)
def _damage_once(folder: Path, weights: bool, identity: object) -> str:
    del identity  # another one is another content
    return damage_of(folder, lambda name: name.endswith(".safetensors") == weights, partial=_is_of_hub(folder))


def _identity(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Names, sizes and times of a folder's files."""
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return tuple((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for name, status in found)


def _digests(folder: Path, names: Iterable[str]) -> list[str]:
    """Digests of files, several at a time: hashing releases Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: sha256(folder / name), names))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
