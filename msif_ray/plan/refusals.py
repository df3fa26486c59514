"""What `msif run` would refuse where the plan is made. The run may be on another machine, so these are notes."""

import os

import torch

from msif_ray.errors import UserError
from msif_ray.machines import check_room, cluster_address
from msif_ray.preflight import Resolved
from msif_ray.record import check_record


def refusals(resolved: Resolved) -> list[str]:
    """A note on a run directory that holds another run, and one on replicas that this machine has no room for."""
    notes = []
    try:
        check_record(resolved)
    except UserError as error:
        notes.append(f"The run would stop before its first step: {error}.")
    try:
        if cluster_address() is None:
            check_room(resolved.run.cluster, float(os.cpu_count() or 1), float(torch.cuda.device_count()))
    except UserError as error:
        notes.append(f"On this machine the run would stop before its first step: {error}.")
    return notes
