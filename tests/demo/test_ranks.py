"""What the table of ranks scores is what a run of that rank or energy would."""

import pytest
import torch

from msif_ray.demo.ranks import SETTINGS, all_vectors, cut_to
from msif_ray.influence.directions import DenseDirections, Directions
from msif_ray.influence.queries import truncate


def dense(directions: Directions) -> torch.Tensor:
    return directions.matrix if isinstance(directions, DenseDirections) else directions.dense


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_a_setting_cuts_as_a_run_does(shape: tuple[int, int], tokens: int) -> None:
    """Of queries of few tokens, too, most of whose singular values are rounding."""
    torch.manual_seed(0)
    out, columns = shape
    carried = torch.randn(8, out, tokens) @ torch.randn(8, tokens, columns)
    whole = all_vectors(carried)
    for setting in SETTINGS[1:]:
        found, ranks, kept = cut_to(setting, carried, whole)
        wanted, share = truncate(carried, setting.rank, setting.energy)
        torch.testing.assert_close(dense(found), dense(wanted), rtol=0, atol=1e-5 * float(carried.abs().max()))
        torch.testing.assert_close(kept, share, rtol=0, atol=1e-6)
        assert setting.rank is None or set(ranks.tolist()) <= {setting.rank, min(shape)}
