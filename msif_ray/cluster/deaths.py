"""The ends of replicas, and of what they stood on."""

from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from msif_ray.errors import UserError


class RankLostError(Exception):
    """Another rank of the replica is gone: its end of a connection closed before Ray knew of its death."""


class NoRoomError(Exception):
    """The place of a replica that was lost has not been filled. No death: that of another is not to be waited for."""


# What tells of the end of a replica, of a rank of it, or of a node or an object that it stood on. A worker that
# Ray's memory monitor ends is an OutOfMemoryError; a lost object's kinds (its owner's death) are ObjectLostErrors.
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RankLostError)


def answer(ref: Any) -> Any:
    """What a replica gives. Raises what ended it, a rank's death as its own, and a user's mistake as such."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, *DEATHS)):
            raise error.cause from None
        raise
