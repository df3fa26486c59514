"""What every part of a run description is made of."""

from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from msif_ray.paths import check_location

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Column = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(check_location)]
Locations = Annotated[str | list[str], AfterValidator(check_location)]


class Strict(BaseModel):
    """Immutable; an unknown key is an error, and so is a truth value for a number, which Python takes for 0 or 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            if isinstance(value, bool) and bool not in kinds and any(issubclass(kind, int | float) for kind in kinds):
                raise ValueError(f"give `{name}` a number, not {str(value).lower()}")
        return given


def _kinds(annotation: Any) -> set[type]:
    """The classes that an annotation's unions are made of."""
    inside = {kind for each in get_args(annotation) for kind in _kinds(each)}
    return inside | ({annotation} if isinstance(annotation, type) else set())


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
