"""YAML as it is meant: what PyYAML drops or stumbles over is refused in one line."""

from typing import Any

import yaml

from msif_ray.errors import UserError

_MERGE = "tag:yaml.org,2002:merge"
_LONGEST_VALUE = 50


def load_yaml(text: str) -> Any:
    """What a YAML document says. Raises UserError, which says why, for one that is not valid or repeats a key."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError("not valid YAML: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes the last of a key's values and lets out what Python raises of a value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As written: of a mapping that has been constructed, keys that were merged into it are repeated by right.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            written, line = (key.tag, key.value), key.start_mark.line + 1
            if written in lines:
                first = lines[written]
                raise UserError(f"line {line}: the key {key.value!r} is there already in line {first}; leave one out")
            lines[written] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError):
            line, kind = node.start_mark.line + 1, node.tag.rpartition(":")[2]
            raise UserError(
                f"not valid YAML: line {line}: {str(node.value)[:_LONGEST_VALUE]!r} is no {kind}; put it in quotes if "
                "it is text"
            ) from None
