"""What every section of a run's configuration has in common."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """One block of the YAML: unknown keys and wrong types are errors, and a loaded section never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def defaults(cls) -> Self:
        """The section with every key at its default."""
        return cls.model_validate({})


def as_tuple(value: Any) -> Any:
    """A YAML list as the tuple that strict pydantic asks for."""
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# YAML has lists only, and strict pydantic would refuse one where a pair is asked for.
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]],
    BeforeValidator(as_tuple),
]
