"""Folders of object storage and models of the hub, fetched once per node for the libraries that read local files."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock

from msif_ray.errors import UserError
from msif_ray.paths import filesystem, is_remote, listing, path_of, reason, storage
from msif_ray.samples import not_here, samples
from msif_ray.shapes import Pair, misfit

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
# What decides how text becomes tokens, without what is for generating alone.
TOKENIZER_IDENTITY = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*.jinja",
)
# What a source begins with: a hub model at a commit, a URL in one state of its files, a folder in one of its weights,
HUB, LISTED, FOLDER = "hub://", "listed://", "folder://"
# a model that an adapter is merged into, in one state of both.
MERGED = "merged://"
READ_BYTES = 2**22
# Folders of the cache whose contents this process has read and found as they were made.
_READ: set[Path] = set()

Listing = list[tuple[str, int, str]]


def obtain(name: str, revision: str | None, patterns: Sequence[str] = MODEL_FILES) -> tuple[Path, str]:
    """The local folder of a model or tokenizer, and its source: what gives any node the same files, or an error.

    `name` is a folder, a URL or a name of the hub. A folder is the other nodes', too, or they have copies of it.
    Raises UserError when there is none or it cannot be fetched.
    """
    if os.path.isdir(name):
        folder = Path(name).resolve()
        return folder, f"{FOLDER}{_weights(folder)}@{folder}"
    if is_remote(name):
        files = _listed(name)
        return _copy(name, _chosen(name, files, patterns)), f"{LISTED}{_digest(files)}@{name}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder")
    folder = _hub_folder(name, revision, patterns)
    return folder, f"{HUB}{name}@{folder_revision(folder) or revision or ''}"


def folder_revision(folder: Path) -> str | None:
    """The commit of a hub snapshot, which its folder is named after."""
    return folder.name if folder.parent.name == "snapshots" else None


def local_model(source: str) -> str:
    """The folder, on this node, of the model of a source of `obtain`.

    Raises UserError when its files cannot be fetched, and when they are no longer those that `obtain` found.
    """
    return _local(source, MODEL_FILES)


def local_tokenizer(source: str) -> str:
    """As `local_model`, without the weights."""
    return _local(source, TOKENIZER_FILES)


def named(source: str) -> str:
    """The folder, URL or name of the hub that a source is of: the adapter's, of a merged model."""
    if source.startswith(HUB):
        return source.removeprefix(HUB).rpartition("@")[0]
    if source.startswith(MERGED):
        return named(json.loads(source.removeprefix(MERGED))[1])
    return source.partition("@")[2] if source.startswith((LISTED, FOLDER)) else source


def merged(digest: str, adapter: str, base: str, tokenizer: str) -> tuple[Path, str]:
    """The local folder and the source of a model made of sources: an adapter, its base, and the base's tokenizer.

    Merged once per node and `digest`, which stands for the state of all three. Raises UserError where that cannot be.
    """

    def make(temporary: Path) -> None:
        from msif_ray.lora import merge  # here: it imports torch, which most that import this module do not need

        merge(Path(local_model(adapter)), Path(local_model(base)), Path(local_tokenizer(tokenizer)), temporary)

    folder = cache_folder() / digest
    with storage(f"{folder} (a merged model)", "written"):
        _made(folder, make)
    return folder, f"{MERGED}{json.dumps([digest, adapter, base, tokenizer])}"


def _local(source: str, patterns: Sequence[str]) -> str:
    if source.startswith(MERGED):
        return str(merged(*json.loads(source.removeprefix(MERGED)))[0])
    if source.startswith(HUB):
        name, _, revision = source.removeprefix(HUB).rpartition("@")
        return str(_hub_folder(name, revision or None, patterns))
    if source.startswith(FOLDER):
        digest, _, folder = source.removeprefix(FOLDER).partition("@")
        if not os.path.isdir(folder):
            raise not_here(folder)
        if patterns == MODEL_FILES and _weights(Path(folder)) != digest:
            raise _other_than_begun(folder)
        return folder
    if not source.startswith(LISTED):
        return source
    digest, _, url = source.removeprefix(LISTED).partition("@")
    files = _listed(url)
    if _digest(files) != digest:
        raise _other_than_begun(url)
    return str(_copy(url, _chosen(url, files, patterns)))


def _other_than_begun(name: str) -> UserError:
    return UserError(f"{name}: its files have changed since this run was started; put them back, or start it again")


def _weights(folder: Path) -> str:
    """What changes when a folder's weights do. Of contents and not of times, which differ between nodes' copies."""
    digest = hashlib.sha256()
    with storage(folder, "read"):
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
            for sample in samples(path, size):
                digest.update(sample)
    return digest.hexdigest()[:32]


def _digest(files: Listing) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]


def _hub_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A hub model's snapshot, downloaded unless it is there. Raises UserError with the hub's reason."""
    from huggingface_hub import snapshot_download  # here: it takes longer than much that imports this module
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        parent = os.path.dirname(name)
        where = f": no such folder in {parent}/" if os.path.isdir(parent) else " is no local folder"
        raise UserError(f"{name}{where}, and the hub does not give it: {reason(error)}") from None


def fetched(url: str, patterns: Sequence[str] = ("*",)) -> Path:
    """A local copy of the files under `url` whose names match; fetched once per node and state of the files.

    Raises UserError when nothing is there or it cannot be fetched.
    """
    return _copy(url, _chosen(url, listing(url), patterns))


def _copy(url: str, files: Listing) -> Path:
    """A copy in `cache_folder()`, under a name made of the URL, the files and their state: whole or absent."""
    name = _digest([(url, 0, ""), *files])
    folder = cache_folder() / name
    with storage(f"{url} (its local copy {folder})", "fetched"):
        _made(folder, lambda temporary: _fetch(url, files, temporary))
    return folder


def _made(folder: Path, make: Callable[[Path], None]) -> None:
    """Has `make` fill a folder of the cache, whole or not at all, unless it is there as it was made: once per node.
    Processes look at the same time, and make one after the other."""
    if _as_made(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _as_made(folder):
            with _whole(folder) as temporary:
                make(temporary)


def _as_made(folder: Path) -> bool:
    """Whether a folder of the cache has all its files as they were written: one may have been deleted since, cut short
    by a full disk, or spoilt by a bad one or by a crash. Contents are read once in a process, sizes always."""
    try:
        made = json.loads(_sums(folder).read_bytes())
        whole = misfit(made, dict[str, Pair[Any]]) is None and all(
            (folder / name).stat().st_size == size for name, (size, _) in made.items()
        )
        if whole and folder not in _READ:
            whole = all(_checksum(folder / name) == checksum for name, (_, checksum) in made.items())
    except (OSError, ValueError):
        return False
    if whole:
        _READ.add(folder)
    return whole


def _sums(folder: Path) -> Path:
    """Where the sizes and checksums of a cached folder's files are: beside it, since libraries read all that is in."""
    return folder.with_name(f"{folder.name}.sums")


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where copies are kept: MSIF_CACHE, or `msif_ray` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MSIF_CACHE") or f"{user}/msif_ray").expanduser()


def _listed(url: str) -> Listing:
    """The files under a model's URL that any part of it is made of."""
    return _chosen(url, listing(url), MODEL_FILES)


def _chosen(url: str, files: Listing, patterns: Sequence[str]) -> Listing:
    """The files whose names match. Raises UserError when there is none, and for a name that leads elsewhere."""
    chosen = [file for file in files if file[0] and any(fnmatchcase(file[0], pattern) for pattern in patterns)]
    for name, _, _ in chosen:
        if ".." in name.split("/"):  # an object's name is any text; it must not lead out of the cache
            raise UserError(f"{url}: the object {name!r} cannot be a file; rename it")
    if not chosen:
        raise UserError(f"{url}: there is no such folder, or no file in it that matches {', '.join(patterns)}")
    return chosen


def _fetch(url: str, files: Listing, folder: Path) -> None:
    source, root = filesystem(path_of(url))
    for name, size, _ in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source.get_file(f"{root.rstrip('/')}/{name}", str(target))
        if target.stat().st_size != size:
            raise _changed(url)
    if not set(files) <= set(listing(url)):  # of one size, but written again meanwhile
        raise _changed(url)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends, its checksums beside it, and is gone
    where that fails."""
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        files = {str(file.relative_to(temporary)): file for file in temporary.rglob("*") if file.is_file()}
        made = {name: (file.stat().st_size, _checksum(file)) for name, file in files.items()}
        shutil.rmtree(folder, ignore_errors=True)
        _sums(folder).write_text(json.dumps(made), encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _changed(url: str) -> UserError:
    return UserError(f"{url}: its files have changed while they were fetched; run the same command again")
