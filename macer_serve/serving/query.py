"""The query of `POST /predict`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PredictQuery(BaseModel):
    """What a request may ask for. A name that is not a field here is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Annotated[str | None, Field(description="A name of /models. Default: the first.")] = None
    n: Annotated[int | None, Field(ge=1, description="A cap on estimation votes, at most the plan's n.")] = None
    alpha: Annotated[float | None, Field(gt=0, description="1 - confidence, up to the server's limit.")] = None
    radius: Annotated[float | None, Field(gt=0, description="Stop when a radius of this size is decided.")] = None
    tolerance: Annotated[
        float | None, Field(gt=0, description="Stop when more votes would add no more than this to the radius.")
    ] = None
    mode: Annotated[Literal["certify", "predict"], Field(description="predict: the class, no radius.")] = "certify"
    coarse: Annotated[
        bool | None, Field(description="false hides coarse answers: they become abstentions. Default: the operator's.")
    ] = None
    timeout_s: Annotated[float | None, Field(gt=0, description="Deadline, up to the server's limit.")] = None
    stream: Annotated[bool, Field(description="Server-sent events: progress, then one result or error.")] = False

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        if unknown := sorted(set(values) - set(cls.model_fields)):
            raise ValueError(f"unknown parameter {', '.join(unknown)}; known: {', '.join(cls.model_fields)}")
        return values
