"""Typed content of the `extra` column of a job, shown in API responses.

Written when a job is submitted, read for every response. Rows of former versions have the same
keys; keys that they lack get the default of the field, keys that are unknown here are ignored.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _check_seconds(text: str) -> str:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError("expected a number of seconds >= 0")
    return text


Seconds = Annotated[str, AfterValidator(_check_seconds)]


class JobMetadata(BaseModel):
    """API metadata of a job. The field names are the JSON keys of the row."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    model: str = Field(
        default="sora-2", description="Model name of the request, possibly an alias."
    )
    prompt: str | None = Field(default=None, description="Prompt as the client wrote it.")
    seconds: Seconds = Field(
        default="0", description="Length as decimal text; 0 for a source of unknown length."
    )
    size: str = Field(default="", description="Width x height to generate.")
    requested_size: str | None = Field(
        default=None, description="Size of the request; None if as `size`."
    )
    fps: float | None = Field(default=None, gt=0, description="Frames per second to generate.")
    verb: str | None = Field(
        default=None, description="Edit verb or storyboard; None for other videos."
    )
    remixed_from: str | None = Field(default=None, description="Id of the remixed video.")
    parents: list[str] = Field(default=[], description="Ids of the edited videos.")
    characters: list[str] = Field(default=[], description="Ids of the characters in the video.")
    described: dict[str, str] = Field(
        default={}, description="Description put into the prompt, by character name."
    )
    consent: dict[str, str] | None = Field(default=None, description="Consent: who, scope, expiry.")
    notices: list[str] = Field(default=[], description="Notices for the client.")
    variations: list[str] = Field(
        default=[], description="Ids of the other videos of one request (n > 1)."
    )
    extensions: int = Field(
        default=0, ge=0, description="Number of extensions that led to this video."
    )
    steps: int = Field(default=1, ge=1, description="Sampling steps; 1 where no model is used.")

    @classmethod
    def from_row(cls, extra: Mapping[str, Any]) -> "JobMetadata":
        """Read the `extra` column.

        Raises ValidationError, without the values, for a malformed row.
        """
        return cls.model_validate(extra)

    def to_row(self) -> dict[str, Any]:
        """Return the JSON values of the `extra` column."""
        return self.model_dump(exclude_none=True)

    def replace(self, **changes: Any) -> "JobMetadata":
        """Return a validated copy with changed fields."""
        return self.model_validate({**self.model_dump(), **changes})

    @property
    def duration(self) -> float:
        """Length in seconds; 0 if it is unknown."""
        return float(self.seconds)
