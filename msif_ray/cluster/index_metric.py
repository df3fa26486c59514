"""The metric of one map in an index, on storage: in which coordinates the index has its pseudo-tokens."""

from collections.abc import Mapping
from pathlib import Path

import torch

from msif_ray import layout
from msif_ray.cluster.factors import load_factor
from msif_ray.indexes import whole
from msif_ray.influence.compress import Metric
from msif_ray.influence.ekfac import Basis
from msif_ray.store import save_tensors
from msif_ray.tensorfile import TensorFile

_METRIC = ("activation_basis", "gradient_basis", "activation_weights", "gradient_weights")


def write_metric(map_name: str, folder: Path, factors: Path, damping: Mapping[str, float]) -> None:
    """Writes one map's metric, from a stage's factors and its damping (an eigenvalue), into the folder of an index."""
    metric = Metric.of(load_factor(factors, map_name), damping[map_name])
    parts = metric.basis.activations, metric.basis.gradients, metric.activation_weights, metric.gradient_weights
    tensors = dict(zip(_METRIC, parts, strict=True))
    save_tensors(layout.metric_file(folder, map_name), tensors, {"map": map_name, "index": folder.name})


def load_metric(folder: Path, map_name: str, device: torch.device) -> Metric:
    """One map's metric from the folder of an index. Raises UserError, saying what to do, for a file that is damaged, or
    another map's or index's."""
    with whole(folder):
        file = TensorFile(layout.metric_file(folder, map_name), {"map": map_name, "index": folder.name})
        tensors = {name: file.tensor(name).to(device) for name in _METRIC}
    basis = Basis(tensors["activation_basis"], tensors["gradient_basis"])
    return Metric(basis, tensors["gradient_weights"], tensors["activation_weights"])
