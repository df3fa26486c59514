"""A corpus of which no document can be used, in the words of a plan and of a run."""

from collections.abc import Mapping

from msif_ray.config import Documents
from msif_ray.errors import UserError


def most_often(reasons: Mapping[str, int]) -> str:
    """The commonest of the `reasons`, which are counted, as the end of a sentence."""
    return f", most often because: {max(reasons, key=lambda reason: reasons[reason])}" if reasons else ""


def none_usable(documents: Documents, key: str, stage: str, reasons: Mapping[str, int]) -> UserError:
    """What is raised where a stage needs documents; `key` names its corpus."""
    return UserError(
        f"{key}.path: {documents.path}: no document of stage {stage!r} can be used: {sum(reasons.values()):,} were "
        f"skipped{most_often(reasons)}; name other documents or columns"
    )
