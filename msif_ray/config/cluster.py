"""The machines."""

from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from msif_ray.config.base import Strict


class Replicas(Strict):
    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        if isinstance(value, str | float | list | bool):
            raise ValueError(f"give a number, or a mapping of min and max, not {value!r}")
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Cluster(Strict):
    """The machines: replicas, each of one or more ranks that hold one model.

    `gpus_per_rank` is a share of one GPU, or a whole number; several ranks that hold one model need one each at least.
    `factor_memory` (bytes, or a text such as 8GiB) is what a rank may use for the factors that it fits; what
    does not fit at once takes several passes. By default it is a share of what is free once the model is loaded. Scores
    with `detail.curvature_norm` hold a stage's factors in it, by default in what directions leave of that share, half
    of it at least; what does not fit is read from local disk for every batch.
    `directions_memory` is what a rank may use for the carried-back queries that it scores with, in the same units and
    with the same default; what does not fit is read from local disk for every batch. It also decides how many queries
    conjugate gradients solve together, which shows in their answers within the tolerance; run.json says how many.
    `activations_memory` is what a rank that holds a whole model on CPUs may use for the activations and gradients of a
    fit's first pass, so that the second need not compute them again: by default a fifth of what is free; 0 keeps none.
    `offload` keeps the shards of a replica of several GPU ranks in the memory of their hosts.

    `dtype`, `tokens_per_batch` and `documents_per_block` take part in rounding, so they are part
    of what a run must keep; the rest may change between two runs of the same command.
    """

    replicas: Replicas = Replicas()
    ranks_per_replica: Annotated[int, Field(ge=1)] = 1
    gpus_per_rank: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    cpus_per_rank: Annotated[int, Field(ge=1)] = 1
    offload: bool = False
    factor_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    directions_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    activations_memory: Annotated[ByteSize, Field(ge=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tokens_per_batch: Annotated[int, Field(ge=1)] = 8192
    documents_per_block: Annotated[int, Field(ge=1)] = 256

    @field_validator("gpus_per_rank")
    @classmethod
    def _as_ray_counts(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} is over 1 and no whole number; a rank has a part of one GPU, or whole ones")
        return gpus
