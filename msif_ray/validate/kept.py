"""Parts of an experiment that are not computed twice, and what they are of, so that none is taken for another's."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msif_ray.errors import UserError
from msif_ray.store import read_json, write_json

SETTING = "setting.json"


def check_setting(folder: Path, setting: Mapping[str, Any]) -> None:
    """Keeps what the folder's parts are of, in its `setting.json`.

    Raises UserError, which names what differs, where the folder holds parts of another setting.
    """
    path, own = folder / SETTING, plain(setting)
    if not path.exists():
        write_json(path, own)
    elif other := _differing(read_json(path), own):
        raise UserError(f"--folder: {folder} holds another setting: {other}; give another folder")


def kept(
    folder: Path, name: str, part: Callable[[], Any], say: Callable[[str], None], of: Mapping[str, Any] | None = None
) -> Any:
    """The part that is in `<name>.json`, or else is made, and then goes there; says how long it took.

    `of` is what the part depends on beyond the folder's setting. Raises UserError as `check_kept` does.
    """
    path, own = folder / f"{name}.json", plain(of or {})
    if not path.exists():
        began = time.monotonic()
        write_json(path, {"of": own, "part": part()})
        say(f"{name}: {time.monotonic() - began:.0f} s")
    check_kept(folder, name, own)
    return read_json(path)["part"]


def check_kept(folder: Path, name: str, of: Mapping[str, Any]) -> None:
    """Raises UserError, which names what differs, where a part is kept that is of something else."""
    path = folder / f"{name}.json"
    if not path.exists():
        return
    found = read_json(path)
    if other := _differing(found.get("of") if isinstance(found, dict) else None, plain(of)):
        raise UserError(f"{path} is of another setting: {other}; give another --folder, or delete the file")


def plain(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(value))


def _differing(found: Any, own: Any) -> str:
    """Each value that is not what is asked for, after the keys that lead to it; "" for none."""
    if not isinstance(found, dict):
        return "one that it does not name"
    one, other = dict(_leaves(found)), dict(_leaves(own))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return ", ".join(f"{key} {one.get(key)}, not {other.get(key)}" for key in keys)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, each in value.items():
        yield from _leaves(each, f"{key}.{name}" if key else name)
