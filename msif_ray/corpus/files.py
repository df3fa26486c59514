"""The files of a corpus: what its paths and globs name, and of what kind each is."""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msif_ray.config import Documents
from msif_ray.errors import UserError
from msif_ray.paths import exists, find, is_remote, path_of, storage
from msif_ray.unicode import is_unicode


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus (or one saved `datasets` folder) and the name its rows' ids begin with. `state` is what
    `states.state_of` found when the run was checked (None: nothing to be compared with)."""

    path: str
    name: str
    kind: Literal["parquet", "jsonl", "datasets"]
    state: tuple[int, str] | None = None


def corpus_files(documents: Documents, key: str) -> list[CorpusFile]:
    """The files that a corpus's paths and globs name, in sorted order per pattern.

    Raises UserError, naming `key`, for a pattern that matches nothing, for a file of another kind and for a name
    that is not UTF-8.
    """
    patterns = [documents.path] if isinstance(documents.path, str) else documents.path
    paths: dict[str, bool] = {}
    for pattern in patterns:
        found = _found(pattern, key)
        if not found:
            where = "" if is_remote(pattern) or os.path.isabs(pattern) else f" in {os.getcwd()}"
            raise UserError(f"{key}.path: no file matches {pattern}{where}")
        bad = next((path for path in found if not is_unicode(path)), None)
        if bad is not None:  # run.json and the ids of its documents could not hold it
            shown = os.fsencode(bad).decode(errors="backslashreplace")
            raise UserError(f"{key}.path: {shown}: its name is not UTF-8; rename it")
        paths |= found  # a glob may name a file twice, too, by two ways to it
    if not paths:
        raise UserError(f"{key}.path: names no file")
    root = os.path.commonpath([os.path.dirname(_comparable(path)) for path in paths])
    return [
        CorpusFile(path, os.path.relpath(_comparable(path), root), _kind(path, is_folder, key))
        for path, is_folder in paths.items()
    ]


def _found(pattern: str, key: str) -> dict[str, bool]:
    """The absolute paths or the URLs that a path or a glob names, sorted, and whether each is a folder."""
    try:
        if is_remote(pattern):
            return find(pattern)
    except UserError as error:
        raise UserError(f"{key}.path: {error}") from None
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    return {os.path.abspath(path): os.path.isdir(path) for path in found}


def _comparable(path: str) -> str:
    """A URL as an absolute path, to be compared with other paths."""
    return "/" + path.replace("://", "/", 1) if is_remote(path) else path


def _kind(path: str, is_folder: bool, key: str) -> Literal["parquet", "jsonl", "datasets"]:
    if is_folder:
        folder = path_of(path)
        if exists(folder / "state.json"):
            return "datasets"
        with storage(f"{key}.path: {path}", "listed"):
            splits = sorted(str(state.parent) for state in folder.glob("*/state.json"))
        if splits:  # as `datasets` saves a DatasetDict
            raise UserError(f"{key}.path: {path} holds several splits; name those that are meant: {', '.join(splits)}")
        raise UserError(f"{key}.path: {path} is a folder but no saved `datasets` split; name its files with a glob")
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    raise UserError(f"{key}.path: {path}: not .parquet, .jsonl or a saved `datasets` folder")
