"""Paths on local disk and on object storage alike, and the one line that a storage's fault becomes.

A path with a protocol is a `upath.UPath`, which has the methods of `pathlib.Path` over fsspec. Credentials come
from the environment alone; none is read here, and none is ever part of a path or of a message.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from msif_ray.errors import UserError, one_line
from msif_ray.unicode import is_unicode

PROTOCOLS = ("s3", "gs")
Location = TypeVar("Location", str, list[str])
# What the clients of object storage raise is often no OSError; these are the packages that it is defined in.
_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3"})
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def is_remote(path: str | Path) -> bool:
    """Whether a path is on object storage."""
    return "://" in path if isinstance(path, str) else not isinstance(path, Path)


def check_location(location: Location) -> Location:
    """Gives a path or paths back. Raises ValueError for what cannot be one, and, without repeating it, for a URL with
    credentials in it."""
    for text in [location] if isinstance(location, str) else location:
        protocol, separator, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if separator and "@" in bucket:
            raise ValueError(f"{protocol}://…@…: credentials do not belong in a path; set them in the environment")
        if not text:
            raise ValueError("the path is empty; name a folder or a file")
        if protocol in PROTOCOLS and separator and not bucket:
            raise ValueError(f"{text}: there is no bucket in it; name one after {protocol}://")
        if protocol in PROTOCOLS and separator and key.startswith("/"):  # s3fs looks for it without the slash
            raise ValueError(f"{text}: its first folder has no name; leave out a slash")
        if protocol in PROTOCOLS and separator and set(bucket) & set("*?[]"):
            raise ValueError(f"{text}: a bucket is named in full, without *, ?, [ and ]")
        if "\0" in text or not is_unicode(text):
            raise ValueError(f"{text!r}: a path has neither null characters nor lone surrogates")
    return location


def path_of(text: str | Path) -> Path:
    """The path that a text names: a `UPath` for s3:// and gs://, which is used like the `Path` it is typed as.

    Raises UserError for another protocol and for a URL with credentials in it.
    """
    if not isinstance(text, str):
        return text
    if not is_remote(text):
        return Path(text)
    try:
        protocol = check_location(text).partition("://")[0]
    except ValueError as error:
        raise UserError(str(error)) from None
    if protocol not in PROTOCOLS:
        raise UserError(f"{text}: only local paths, s3:// and gs:// are supported")
    from upath import UPath  # slow to import, and most runs are local

    # What fails is raised, in one line; this client prints a traceback of it as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

    # Other processes write to the same folders: a listing that is kept would hide what they wrote.
    return cast(Path, UPath(text, use_listings_cache=False))


def filesystem(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path's name there."""
    remote = cast(Any, path)
    return remote.fs, remote.path


@contextmanager
def storage(path: str | Path, action: str) -> Iterator[None]:
    """Turns faults of the storage, whichever it is, into a UserError: `path: cannot be <action>: reason`."""
    try:
        yield
    except Exception as error:
        if not is_storage_fault(error):
            raise
        raise UserError(f"{path}: cannot be {action}: {reason(error)}") from None


def is_storage_fault(error: Exception) -> bool:
    """Whether an exception comes from a disk or from a client of object storage."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS


def reason(error: Exception) -> str:
    """What an exception says, in one line and without a credential."""
    strerror = getattr(error, "strerror", None)
    text = one_line(_without_secrets(str(strerror or error))) or type(error).__name__
    if isinstance(error, FileNotFoundError) and not strerror and " " not in text:
        text = "no such file or bucket"
    if isinstance(error, PermissionError) and not strerror:
        text += "; check the credentials in the environment"
    return text


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        value = os.environ.get(name)
        text = text.replace(value, "…") if value else text
    return re.sub(r"://[^/\s@]*@", "://…@", text)


def exists(path: Path) -> bool:
    """Whether there is a file or folder. Raises UserError when the storage does not say."""
    with storage(path, "read"):
        return path.exists()


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files directly in a folder whose name matches, sorted; none where there is no folder.

    On object storage one listing, whatever their number. Raises UserError when the storage does not list them.
    """
    return [folder / name for name in names_matching(folder, pattern)]


def names_matching(folder: Path, pattern: str) -> list[str]:
    """The names of the files of `matching`: of very many, a path takes more memory and time than what it is for."""
    with storage(folder, "listed"):
        names = _names(folder, "file")
    return sorted(name for name in names if fnmatchcase(name, pattern))


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted, as `matching` finds its files."""
    with storage(folder, "listed"):
        return sorted(folder / name for name in _names(folder, "directory"))


def _names(folder: Path, kind: Literal["file", "directory"]) -> list[str]:
    """The names of what is directly in a folder: never a glob, to which a folder's own name can be a pattern."""
    try:
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if (entry.is_file() if kind == "file" else entry.is_dir())]
        files, root = filesystem(folder)
        prefix = root.rstrip("/") + "/"
        found = files.ls(root, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    below = (about["name"].removeprefix(prefix) for about in found if about["type"] == kind)
    return [name for name in below if name and "/" not in name]  # else the folder's own marker, or a file of its name


def listing(url: str | Path) -> list[tuple[str, int, str]]:
    """`(name below the URL, bytes, version)` of every object there, by name; an object at the URL itself has none.

    Raises UserError when the storage does not list them.
    """
    files, root = filesystem(path_of(url))
    root = root.rstrip("/")
    with storage(url, "listed"):
        found: dict[str, dict[str, Any]] = files.find(root, detail=True)
    return [
        (name[len(root) + 1 :], int(about["size"]), _version(about))
        for name, about in sorted(found.items())
        if f"{name}/".startswith(f"{root}/")
    ]


def _version(about: Mapping[str, Any]) -> str:
    """What changes when an object is written again: its etag, or the time of the last change."""
    return str(about.get("ETag") or about.get("etag") or about.get("LastModified") or about.get("mtime"))


def missing(paths: Iterable[Path]) -> list[Path]:
    """Those of the files that are not there, with one listing of each folder that they are in."""
    present: dict[Path, frozenset[str]] = {}

    def is_missing(path: Path) -> bool:
        folder = path.parent
        if folder not in present:
            present[folder] = frozenset(names_matching(folder, "*"))
        return path.name not in present[folder]

    return [path for path in paths if is_missing(path)]


def all_there(paths: Iterable[Path]) -> bool:
    """Whether all of the files are there, as `missing` finds them."""
    return not missing(paths)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder. Raises UserError when the storage does not say."""
    with storage(path, "read"):
        if is_remote(path):
            files, name = filesystem(path)
            return int(files.du(name, total=True))
        found = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in found if file.is_file())


def find(pattern: str) -> dict[str, bool]:
    """The files and folders that a remote glob, or a remote path, names, as sorted URLs; of each, whether it is a
    folder, which the listing says of all at once.

    Raises UserError when the storage does not list them.
    """
    files, name = filesystem(path_of(pattern))
    protocol = pattern.partition("://")[0]
    with storage(pattern, "listed"):
        if files.exists(name):
            found = {name: files.isdir(name)}
        else:
            listed = files.glob(name, detail=True)
            found = {path: about["type"] == "directory" for path, about in listed.items()}
    return {f"{protocol}://{path}": found[path] for path in sorted(found)}
