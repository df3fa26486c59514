"""What norms in the scored stage's inverse curvature take of a rank's memory."""

from msif_ray.cluster.score_jobs import left_beside
from msif_ray.config import Run
from msif_ray.influence.groups import FREE_SHARE, Shapes
from msif_ray.plan import counts

GIBI = 2**30


def held_bytes(run: Run, shapes: Shapes, itemsize: int, free: float | None, directions: int) -> int:
    """Bytes of the scored stage's factors that stay in memory: all, none where no such norm is wanted, or what has
    room. `free` is what a rank has left with its model loaded (None: not known), `directions` what those need."""
    if not run.detail.curvature_norm:
        return 0
    needed = counts.curvature_bytes(shapes, itemsize)
    if run.cluster.factor_memory is not None:
        return min(needed, run.cluster.factor_memory)
    directions = min(directions, run.cluster.directions_memory or directions)
    return needed if free is None else min(needed, max(0, left_beside(directions, int(FREE_SHARE * free))))


def streaming_note(run: Run, shapes: Shapes, itemsize: int, held: int, stage: str) -> list[str]:
    """A note on factors that do not fit."""
    needed = counts.curvature_bytes(shapes, itemsize) if run.detail.curvature_norm else 0
    if needed <= held:
        return []
    return [
        f"{stage}: of {needed / GIBI:.3g} GiB of factors for detail.curvature_norm {held / GIBI:.3g} GiB fit in "
        "cluster.factor_memory; the rest is read from local disk for every batch, and the time of that is not counted. "
        "Larger batches (cluster.tokens_per_batch) read less often."
    ]
