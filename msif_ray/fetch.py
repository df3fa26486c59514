"""Folders of object storage and models of the hub, fetched once per node for the libraries that read local files."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from msif_ray.errors import UserError
from msif_ray.paths import filesystem, is_remote, path_of, reason, storage

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
HUB = "hub://"


def hub_source(name: str, revision: str) -> str:
    """A hub model's commit as one text that `local_model` takes on any node."""
    return f"{HUB}{name}@{revision}"


def local_model(source: str) -> str:
    """The folder, on this node, of a model: a path as it is, a URL's or a `hub_source`'s files fetched.

    Raises UserError when they cannot be fetched.
    """
    return _local(source, MODEL_FILES)


def local_tokenizer(source: str) -> str:
    """As `local_model`, without the weights. A name of the hub stays."""
    return _local(source, TOKENIZER_FILES)


def _local(source: str, patterns: Sequence[str]) -> str:
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).rpartition("@")
        return str(hub_folder(name, revision, patterns))
    return str(fetched(source, patterns)) if is_remote(source) else source


def hub_folder(name: str, revision: str | None, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """A hub model's snapshot, downloaded unless it is there. Raises UserError with the hub's reason."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(f"{name} is no local folder, and the hub does not give it: {reason(error)}") from None


def fetched(url: str, patterns: Sequence[str] = ("*",)) -> Path:
    """A local copy of the files under `url` whose names match; fetched once per node and state of the files.

    The copy is in `cache_folder()`, under a name made of the URL and the files' sizes and etags (or times), and is
    whole or absent. Raises UserError when nothing is there or it cannot be fetched.
    """
    files = _listing(url, patterns)
    name = hashlib.sha256(json.dumps([url, files]).encode()).hexdigest()[:32]
    folder = cache_folder() / name
    with storage(f"{url} (its local copy {folder})", "fetched"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not folder.is_dir():
                _fetch(url, files, folder)
    return folder


def cache_folder() -> Path:
    """Where copies are kept: MSIF_CACHE, or `msif_ray` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MSIF_CACHE") or f"{user}/msif_ray").expanduser()


def _listing(url: str, patterns: Sequence[str]) -> list[tuple[str, int, str]]:
    """`(name relative to the URL, bytes, version)` of every file that matches, in the order of names."""
    path = path_of(url)
    files, root = filesystem(path)
    root = root.rstrip("/")
    with storage(url, "listed"):
        found: dict[str, dict[str, Any]] = files.find(root, detail=True)
    listing = []
    for name, about in sorted(found.items()):
        relative = name.removeprefix(f"{root}/")
        if relative != name and any(fnmatchcase(relative, pattern) for pattern in patterns):
            if ".." in relative.split("/"):  # an object's name is any text; it must not lead out of the cache
                raise UserError(f"{url}: the object {relative!r} cannot be a file; rename it")
            listing.append((relative, int(about["size"]), _version(about)))
    if not listing:
        raise UserError(f"{url}: there is no such folder, or no file in it that matches {', '.join(patterns)}")
    return listing


def _version(about: dict[str, Any]) -> str:
    """What changes when an object is written again: its etag, or the time of the last change."""
    return str(about.get("ETag") or about.get("etag") or about.get("LastModified") or about.get("mtime"))


def _fetch(url: str, files: Sequence[tuple[str, int, str]], folder: Path) -> None:
    """Downloads into a temporary folder, which is renamed when it is whole. Called under the folder's lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    source, root = filesystem(path_of(url))
    try:
        for name, size, _ in files:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            source.get_file(f"{root.rstrip('/')}/{name}", str(target))
            if target.stat().st_size != size:
                raise UserError(f"{url}: {name} has changed while it was fetched; run the same command again")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
