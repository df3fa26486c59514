"""What a JSON file is to look like, and which key is at fault where it does not."""

from typing import Any

import pytest
from pydantic import BaseModel

from msif_ray.shapes import Pair, misfit


class Map(BaseModel):
    shape: Pair[int]
    mean: float = 0.0


class Shape(BaseModel):
    maps: dict[str, Map]
    blocks: list[str]
    vectors: list[int | None]


WHOLE = {
    "maps": {"a": {"shape": [2, 3], "mean": 1}, "b?": {"shape": [2, 3]}},
    "blocks": [],
    "vectors": [1, None],
    "x": 1,
}


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({}, None),
        ({"blocks": ["a", "b"]}, None),
        ({"blocks": ["a", 1]}, "blocks.1"),
        ({"blocks": {}}, "blocks"),
        ({"vectors": [True]}, "vectors.0"),
        ({"vectors": [1.0]}, "vectors.0"),
        ({"vectors": ["1"]}, "vectors.0"),
        ({"maps": {"a": {"shape": [1, 2], "mean": True}}}, "maps.a.mean"),
        ({"maps": []}, "maps"),
        ({"maps": {"a": {"mean": 1.5}}}, "maps.a.shape"),
        ({"maps": {"a": {"shape": [1, 2, 3]}}}, "maps.a.shape"),
        ({"maps": {"a": {"shape": [1, 2], "mean": "x"}}}, "maps.a.mean"),
        ({"maps": {"a": 3}}, "maps.a"),
    ],
)
def test_the_first_key_of_another_shape_is_named(change: dict[str, Any], at: str | None) -> None:
    assert misfit(WHOLE | change, Shape) == at


def test_what_is_no_object_or_lacks_a_key() -> None:
    assert misfit([], Shape) == "" and misfit(3, list[int]) == ""
    assert misfit({name: value for name, value in WHOLE.items() if name != "blocks"}, Shape) == "blocks"
