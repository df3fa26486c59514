"""Kronfluence on the same model and documents: its time by step, and how far its scores are from ours."""

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msif_ray.benchmark.steps import Steps
from msif_ray.benchmark.timing import seconds
from msif_ray.benchmark.workload import Workload
from msif_ray.errors import UserError

# Kronfluence, and what it takes besides PyTorch.
PACKAGES = ("kronfluence", "einconv", "opt_einsum")


def check_comparable(workload: Workload) -> None:
    """Raises UserError where Kronfluence is not installed, or would be given padded documents, which it has no room
    for here: nothing is timed for a comparison that cannot be made."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--against: {missing[0]} is not installed; pip install kronfluence==1.0.1")
    if workload.ragged:
        raise UserError("--against: kronfluence is given documents of one length; leave out --ragged")


def compare(workload: Workload, queries: int, keep: int) -> dict[str, float]:
    """Our seconds and Kronfluence's for the fit and the scores, one after the other, and how far the scores differ.

    Both sides fit with the data's own labels, since each samples in its own way.
    """
    steps, device = Steps(workload, sampled=False, keep=keep), workload.device
    steps.passes()
    kept: dict[str, Any] = {}
    ours = {
        "covariance_s": seconds(lambda: kept.update(sums=steps.covariance()), device),
        "eigh_s": seconds(lambda: kept.update(bases=steps.bases(kept["sums"], list(steps.maps))), device),
        "correction_s": seconds(lambda: kept.update(values=steps.correction(kept["bases"])), device),
    }

    def score() -> None:
        kept["scores"] = steps.score(steps.directions(kept["bases"], kept["values"], queries, None))

    steps.forget()
    ours["score_s"] = seconds(score, device)
    theirs = kronfluence(steps, queries, kept["scores"])
    total = sum(ours.values())
    return (
        theirs
        | {f"our_{name}": each for name, each in ours.items()}
        | {
            "our_total_s": total,
            "times_as_long": theirs["total_s"] / total,
        }
    )


def kronfluence(steps: Steps, queries: int, ours: Tensor) -> dict[str, float]:
    """Seconds of its covariances, eigendecompositions, corrected eigenvalues and pairwise scores, and `difference`: the
    largest of the scores `[documents, queries]` from `ours`, relative to the largest score."""
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, prepare_model

    task = make_task(list(steps.maps))
    device, size = steps.workload.device, len(steps.batches[0].keys)
    model = prepare_model(steps.workload.model(), task)
    documents, asked = _Windows(steps.batches), _Windows(steps.workload.queries(queries))
    # With one type for everything, as ours; its defaults are float32 but for the eigendecomposition.
    factor = FactorArguments(strategy="ekfac", use_empirical_fisher=True, eigendecomposition_dtype=torch.float64)
    common: dict[str, Any] = {"factors_name": "f", "overwrite_output_dir": True}
    fitting = common | {"dataset": documents, "per_device_batch_size": size, "factor_args": factor}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "benchmark", model, task, cpu=device == "cpu", disable_tqdm=True, disable_model_save=True, output_dir=folder
        )
        found = {
            "covariance_s": seconds(lambda: analyzer.fit_covariance_matrices(**fitting), device),
            "eigh_s": seconds(lambda: analyzer.perform_eigendecomposition(**common, factor_args=factor), device),
            "correction_s": seconds(lambda: analyzer.fit_lambda_matrices(**fitting), device),
            "score_s": seconds(
                lambda: analyzer.compute_pairwise_scores(
                    "s",
                    "f",
                    query_dataset=asked,
                    train_dataset=documents,
                    per_device_query_batch_size=queries,
                    per_device_train_batch_size=size,
                    score_args=ScoreArguments(damping_factor=None),  # 0.1 times the mean eigenvalue, as ours
                ),
                device,
            ),
        }
        theirs = analyzer.load_pairwise_scores("s")["all_modules"].T.double()
    difference = (theirs - ours.double()).abs().max() / ours.abs().max()
    return found | {"total_s": sum(found.values()), "difference": float(difference)}


class _Windows(torch.utils.data.Dataset[Mapping[str, Tensor]]):
    """Rows of batches that need no padding, one by one."""

    def __init__(self, batches: list[Any]) -> None:
        self._ids = torch.cat([batch.input_ids for batch in batches])
        self._targets = torch.cat([batch.targets for batch in batches])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> Mapping[str, Tensor]:
        return {"input_ids": self._ids[row], "targets": self._targets[row]}


def make_task(tracked: list[str]) -> Any:
    """The summed negative log-likelihood of every token after the first, as Kronfluence's task."""
    from kronfluence import Task

    class LanguageModelling(Task):  # type: ignore[misc, unused-ignore]
        def compute_train_loss(self, batch: Mapping[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            labels = batch["input_ids"][:, 1:]
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

        def compute_measurement(self, batch: Mapping[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
            # Used for covariances alone: of the positions that predict a target.
            return functional.pad(batch["targets"][:, 1:], (0, 1)).long()

    return LanguageModelling()
