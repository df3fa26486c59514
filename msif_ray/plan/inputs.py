"""What a plan is made from: the checked run, and what was counted and measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from msif_ray.plan.counts import ModelSize
from msif_ray.plan.measure import Calibration
from msif_ray.plan.tokens import Tally
from msif_ray.preflight import Resolved


@dataclass(frozen=True)
class PartBytes:
    """What a Parquet part takes: a `footer`, so much per `pair`, and per `value` of the lists that a pair has."""

    footer: float
    pair: float
    value: float


@dataclass(frozen=True)
class Inputs:
    """What the plan is made from. Tallies by `stages.<i>`, `score.<i>` of each pass's first entry, and `queries`;
    calibrations by stage, none where nothing was measured."""

    resolved: Resolved
    tallies: Mapping[str, Tally]
    sizes: Mapping[int, ModelSize]
    calibrations: Mapping[int, Calibration]
    part: PartBytes
