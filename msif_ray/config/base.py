"""What every part of a run description is made of."""

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from msif_ray.paths import check_location

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Column = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(check_location)]
Locations = Annotated[str | list[str], AfterValidator(check_location)]


class Strict(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strength(Strict):
    """A damping or an α: an eigenvalue, or a multiple of each map's mean corrected eigenvalue."""

    absolute: Positive | None = None
    relative: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give either `absolute` or `relative`")
        return self

    def resolve(self, mean_eigenvalue: float) -> float:
        """The eigenvalue meant, for a map with this mean corrected eigenvalue."""
        if self.absolute is not None:
            return self.absolute
        return float(self.relative or 0.0) * mean_eigenvalue
