"""What a run may count on before it asks for machines: the same rules for a run and for its plan."""

import os

from msif_ray.config import Cluster
from msif_ray.errors import UserError


def cluster_address() -> str | None:
    """The Ray cluster that RAY_ADDRESS names, as it does in every job of `ray job submit`; None: a local one."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def with_gpus(cluster: Cluster, present: float) -> Cluster:
    """The cluster with `gpus_per_rank` said: where it is left out, GPUs if some are `present`.

    Raises UserError where none is present and that means nothing: on a cluster that may still get them.
    """
    if cluster.gpus_per_rank is not None:
        return cluster
    if not present and cluster_address() is not None:
        raise UserError(
            "cluster.gpus_per_rank: the cluster has no GPU now, and one that scales from zero gets them only when they "
            "are asked for; set it to 1 to compute on GPUs, or to 0 for CPUs"
        )
    return cluster.model_copy(update={"gpus_per_rank": 1.0 if present else 0.0})


def check_room(cluster: Cluster, cpus: float, gpus: float) -> None:
    """Raises UserError, naming the key, where the first replicas would wait for ever on machines that do not grow."""
    asked = {
        "cpus_per_rank": (cluster.cpus_per_rank, cpus, "cores"),
        "gpus_per_rank": (cluster.gpus_per_rank or 0.0, gpus, "GPUs"),
    }
    for key, (each, present, unit) in asked.items():
        replica, first = each * cluster.ranks_per_replica, cluster.replicas.min
        if replica > present:
            raise UserError(
                f"cluster.{key}: a replica needs {replica:g} {unit} (ranks_per_replica: {cluster.ranks_per_replica}, "
                f"{key}: {each:g}), and this machine has {present:g}; lower one of them"
            )
        if first * replica > present:
            raise UserError(
                f"cluster.replicas.min: {first} replicas need {first * replica:g} {unit}, and this machine has "
                f"{present:g}; set it to {int(present // replica)}"
            )
