"""Parts of an experiment that are not computed twice."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msif_ray.store import write_json


def kept(folder: Path, name: str, part: Callable[[], Any], say: Callable[[str], None]) -> Any:
    """What is in `<name>.json`, or else the part, which then goes there; says how long it took."""
    path = folder / f"{name}.json"
    if not path.exists():
        began = time.monotonic()
        write_json(path, part())
        say(f"{name}: {time.monotonic() - began:.0f} s")
    return json.loads(path.read_text())
