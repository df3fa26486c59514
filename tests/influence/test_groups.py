from msif_ray.influence.groups import factor_bytes, module_groups

SHAPES = {"a": (2, 3), "b": (4, 1), "c": (1, 1), "d": (8, 8)}


def test_factor_bytes_count_two_bases_and_the_sums() -> None:
    assert factor_bytes((2, 3), 4) == 4 * (2 * 2 + 3 * 3 + 2 * 3)


def test_without_a_budget_all_maps_are_one_group() -> None:
    assert module_groups(SHAPES, None) == [("a", "b", "c", "d")]


def test_groups_keep_the_order_and_the_budget() -> None:
    budget = factor_bytes((2, 3), 4) + factor_bytes((4, 1), 4)
    assert module_groups(SHAPES, budget) == [("a", "b"), ("c",), ("d",)]
    assert module_groups(SHAPES, 1) == [("a",), ("b",), ("c",), ("d",)]
