"""The size of a window's gradient in the metric of a stage's inverse curvature: gᵀ r(H) g, summed over maps.

H is the stage's EK-FAC, r(λ) = 1/(λ + c) its damped inverse. Scores divided by the root are the ℓ-relative influence of
Barshan et al. 2020 (arXiv 2003.11630): were query gradients drawn with covariance H, the root would be the spread of
the document's scores over them, so what is left does not favour documents that are large for every query.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.influence.capture import Captured
from msif_ray.influence.ekfac import Basis, rotated_gradients


@dataclass(frozen=True)
class CurvatureMetric:
    """r(H) of one map: its eigenbasis and `weights` r(Λ) `[out, columns]`."""

    basis: Basis
    weights: Tensor

    def squared_norms(self, inputs: Tensor, gradients: Tensor, bias: bool) -> Tensor:
        """Σ_oi r(Λ)[o, i] ((Q_Sᵀ G Q_A)[o, i])² of each row, `[rows]`, in nats per unit of weight.

        From vectors `[rows, positions, in]` and `[rows, positions, out]`; with `bias` the constant 1 is still to be put
        behind the inputs.
        """
        weights = self.weights.flatten()
        rotated = rotated_gradients(inputs, gradients, self.basis, bias)
        return torch.cat([products.square_().flatten(1) @ weights for products in rotated])


def curvature_squares(metrics: Mapping[str, CurvatureMetric], captured: Captured) -> Tensor:
    """gᵀ r(H) g of each window over the maps of `metrics`, `[rows]` in float64; a mapping that reads its metrics when
    asked is asked for each once."""
    total = torch.zeros(len(captured.losses), dtype=torch.float64, device=captured.losses.device)
    for name, metric in metrics.items():
        total += metric.squared_norms(*captured.vectors(name), captured.maps[name].bias).double()
    return total
