"""What tests change in a run's description and in its models' files."""

import json
from pathlib import Path
from typing import Any

Description = dict[str, Any]


def changed(description: Description, key: str, value: Any) -> Description:
    """The same description, with the value at a dotted key replaced, or removed when it is `...`."""
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    target: Any = description
    for parent in parents:
        target = target[parent]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return description


def edit_config(path: Path, **changes: Any) -> None:
    """Replaces values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
