"""Scores of every method against those of conjugate gradients run to convergence (the paper's first experiment)."""

from dataclasses import asdict
from functools import partial
from typing import Any

from msif_ray.validate.compared import compared
from msif_ray.validate.experiment import Experiment, Row
from msif_ray.validate.kept import plain
from msif_ray.validate.separates import separates


def run(experiment: Experiment) -> dict[str, Any]:
    """All parts: `compared` methods, what separates EK-FAC from the truth (`separates`), and `refined` queries.

    Raises UserError where the experiment's folder holds parts of another setting.
    """
    experiment.check()
    found = {"separates": separates(experiment), "refined": _refined(experiment), "compared": compared(experiment)}
    return found | {"setting": plain(_described(experiment))}


def _refined(experiment: Experiment) -> list[Row]:
    """Agreement of the first iterates with the last, and their residuals, at each damping."""
    budget = experiment.budget
    rows: list[Row] = experiment.truth[2]["iterates"]
    for multiple in budget.dampings[1:]:
        about = experiment.kept(f"refined/{multiple}", partial(_few_solved, experiment, multiple))
        rows = rows + about["iterates"]
    return rows


def _few_solved(experiment: Experiment, multiple: float) -> Row:
    return experiment.solved(multiple, experiment.few)[0]


def _described(experiment: Experiment) -> Row:
    setting = experiment.setting
    return {
        "sizes": asdict(experiment.sizes),
        "budget": asdict(experiment.budget),
        "seed": experiment.seed,
        "loss_nats_per_token": setting.loss,
        "tracked_parameters": sum(each.parameters for each in setting.maps.values()),
        "operator_tokens": sum(len(document.ids) for document in setting.documents),
        "truth": {key: value for key, value in experiment.truth[2].items() if key != "iterates"},
    }
