"""Maps in a table of layers and kinds."""

from msif_ray.results.maps import grid, short_names


def test_maps_have_a_layer_and_a_kind() -> None:
    names = ["model.layers.10.mlp.up", "model.layers.2.mlp.up", "model.layers.2.mlp.experts.3.up", "head"]
    layers, kinds, cells = grid(names)
    assert [(layers[layer], kinds[kind]) for layer, kind in cells] == [
        (10, "mlp.up"),
        (2, "mlp.up"),
        (2, "mlp.experts.3.up"),
        (None, "head"),
    ]
    assert layers == [None, 2, 10]
    assert short_names(names) == ["10.mlp.up", "2.mlp.up", "2.mlp.experts.3.up", "head"]


def test_each_of_two_stacks_has_places_of_its_own() -> None:
    names = ["tower.layers.0.up", "text.layers.0.up", "text.layers.1.up", "head"]
    kinds = ["tower.layers.*.up", "text.layers.*.up", "head"]
    assert grid(names) == ([None, 0, 1], kinds, [(1, 0), (1, 1), (2, 1), (0, 2)])
    assert short_names(names) == names
