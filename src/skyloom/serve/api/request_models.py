"""The wire: what clients send, checked and translated. Only here and in answers.py is pydantic known.

The words are OpenAI's; unknown fields are tolerated, as its clients add some with every version. Our own fields (seed,
fps, steps, guidance, ...) are optional everywhere. Numbers may be text, since multipart has nothing else.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from skyloom.serve.api.body import Upload, load_json
from skyloom.serve.api.character_prompts import parse_expiry
from skyloom.serve.api.errors import WireError, invalid
from skyloom.serve.api.numbers import find_number, plain_number

MAX_URL = 20_971_520  # characters of image_url, as OpenAI has it
MAX_CHARACTERS, MAX_VARIATIONS, MAX_SECONDS = 2, 8, 3600
MAX_CARDS, MAX_VIDEOS, MAX_TEXT = 500, 20, 32_000
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}", re.ASCII)
_REFERENCE_KEYS = ("file_id", "image_url", "id", "video_id")
_TYPE_NAMES = {
    "str": "string",
    "dict": "object",
    "list": "array",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
}


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture or video that a call starts from: a file of the call, a stored file, a data URL, or another video."""

    upload: Upload | None = None
    file_id: str | None = None
    url: str | None = None
    video_id: str | None = None


def _reference(value: object) -> Reference:
    """Every spelling of a reference. Raises WireError with OpenAI's own words for what is none."""
    if isinstance(value, Reference):
        return value
    if isinstance(value, Upload):
        return Reference(upload=value)
    value = _plain(value)
    if isinstance(value, str) and value.startswith("data:"):
        value = {"image_url": value}
    elif isinstance(value, str) and re.fullmatch(r"(video|file)[-_][\w-]{1,100}", value, re.ASCII):
        value = {"id" if value.startswith("video") else "file_id": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, but got {_a(value)} instead")
    return _named(cast("Mapping[str, object]", value))


def _named(table: Mapping[str, object]) -> Reference:
    """What an object names: exactly one thing."""
    given = [name for name in _REFERENCE_KEYS if table.get(name) not in (None, "")]
    if len(given) != 1:
        raise ValueError("expected an object with exactly one of file_id, image_url or id")
    text = table[given[0]]
    if isinstance(text, Upload):
        return Reference(upload=text)
    if not isinstance(text, str):
        raise ValueError(f"{given[0]} must be a string")
    if given[0] == "image_url":
        return Reference(url=_url(text))
    if not _ID.fullmatch(text):
        raise ValueError(f"{given[0]} is not an id")
    return Reference(file_id=text) if given[0] == "file_id" else Reference(video_id=text)


def _url(text: str) -> str:
    if len(text) > MAX_URL:
        raise ValueError(f"image_url is longer than {MAX_URL:,} characters")
    return text


def _plain(value: object) -> object:
    """What JSON text in a form field says; everything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return load_json(value.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError('expected seconds, like "8"')
    try:
        number = find_number(value) if isinstance(value, str) else float(value)
    except OverflowError:
        number = None
    if number is None:
        raise ValueError('expected seconds, like "8"')
    if not (math.isfinite(number) and 0 < number <= MAX_SECONDS):
        raise ValueError(f"expected more than 0 and at most {MAX_SECONDS} seconds")
    return number


def _a(value: object) -> str:
    name = _TYPE_NAMES.get(type(value).__name__, "value")
    return f"{'an' if name[0] in 'aio' else 'a'} {name}"


_OBJECT = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("file_id", "image_url", "id")},
}
_REFERENCE_SCHEMA = {
    "anyOf": [
        {**_OBJECT, "minProperties": 1, "maxProperties": 1, "additionalProperties": False},
        {"type": "string"},
    ]
}
AnyReference = Annotated[Reference, BeforeValidator(_reference), WithJsonSchema(_REFERENCE_SCHEMA)]
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS},
            ]
        }
    ),
]
Whole = Annotated[int, BeforeValidator(plain_number)]
Number = Annotated[float, BeforeValidator(plain_number)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[Whole, Field(ge=1, le=MAX_VARIATIONS)]
Table = Annotated[dict[str, Any], BeforeValidator(_plain)]
Tables = Annotated[list[dict[str, Any]], BeforeValidator(_plain), Field(max_length=MAX_CARDS)]
References = Annotated[
    list[AnyReference], BeforeValidator(_plain), Field(min_length=2, max_length=MAX_VIDEOS)
]


class Body(BaseModel):
    """What every body has in common: unknown fields are tolerated. `takes_media`: whether pictures and videos may come
    inside, as data URLs."""

    takes_media: ClassVar[bool] = False

    model_config = ConfigDict(extra="ignore", arbitrary_types_allowed=True, allow_inf_nan=False)


def _expiry(text: str) -> str:
    try:
        parse_expiry(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            "expected a date like 2027-01-31, or a time like 2027-01-31T12:00:00Z"
        ) from error
    return text


class Consent(Body):
    """What a client attests of the people that a picture or clip shows: who agreed, to what, until when."""

    who: Annotated[str, Field(max_length=500)] | None = None
    scope: Annotated[str, Field(max_length=500)] | None = None
    expiry: Annotated[str, Field(max_length=40), AfterValidator(_expiry)] | None = None

    def told(self) -> dict[str, str]:
        """What was said, without what was not."""
        return self.model_dump(exclude_none=True)


Attested = Annotated[Consent, BeforeValidator(_plain)]


class CharacterName(Body):
    """A character by its id."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]


class Sampling(Body):
    """Fields of our own that say how a video is made; all pass through `extra_body` of OpenAI's clients."""

    takes_media = True
    seed: Whole | None = None
    fps: Number | None = None
    steps: Whole | None = None
    guidance: Number | None = None
    negative_prompt: Text = ""
    quality: Annotated[str, Field(max_length=40)] | None = None
    style: Annotated[str, Field(max_length=200)] | None = None
    consent: Attested | None = None


class CreateBody(Sampling):
    """POST /v1/videos."""

    prompt: Text
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Seconds | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    input_reference: AnyReference | None = None
    characters: Annotated[
        list[CharacterName], BeforeValidator(_plain), Field(max_length=MAX_CHARACTERS)
    ] = []
    strength: Share | None = None
    storyboard: Tables = []
    n: Count = 1
    region: Annotated[str, Field(max_length=400)] | None = None


class StoryboardBody(Sampling):
    """POST /v1/videos/storyboard: cards at times; the prompt, if any, is said with each."""

    cards: Annotated[Tables, Field(min_length=1)]
    prompt: Text = ""
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Seconds | None = None
    size: Annotated[str, Field(max_length=40)] | None = None


class EditFields(Sampling):
    """What edits share; which of them a verb takes is in edits.py."""

    prompt: Text = ""
    model: Annotated[str, Field(max_length=200)] | None = None
    video: AnyReference | None = None
    videos: References | None = None
    mask: AnyReference | None = None
    start: Annotated[Number, Field(ge=0)] | None = None
    stop: Annotated[Number, Field(ge=0)] | None = None
    seconds: Seconds | None = None
    strength: Share | Annotated[str, Field(max_length=20)] | None = None
    region: Annotated[str, Field(max_length=4_000)] | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    feather: Annotated[Whole, Field(ge=0, le=512)] | None = None
    backward: bool | None = None
    overlap: Annotated[Number, Field(ge=0)] | None = None
    bridge: Annotated[Number, Field(gt=0)] | None = None
    morph: Annotated[Number, Field(ge=0)] | None = None
    curve: Annotated[str, Field(max_length=400)] | None = None


class RemixBody(EditFields):
    """POST /v1/videos/{id}/remix."""

    prompt: Text = Field(...)


class EditBody(EditFields):
    """POST /v1/videos/edits and its alias under a video."""

    prompt: Text = Field(...)


class ExtendBody(EditFields):
    """POST /v1/videos/extensions."""

    prompt: Text = Field(...)
    seconds: Seconds = Field(...)


class CharacterBody(Body):
    """POST /v1/videos/characters."""

    takes_media = True
    name: Annotated[str, Field(min_length=1, max_length=100)]
    video: AnyReference
    consent: Attested | None = None


class FileBody(Body):
    """POST /v1/files."""

    file: Annotated[Upload, WithJsonSchema({"type": "string", "format": "binary"})]
    purpose: Annotated[str, Field(max_length=40)] = "user_data"


class BatchBody(Body):
    """POST /v1/batches."""

    input_file_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    endpoint: Annotated[str, Field(max_length=100)]
    completion_window: Annotated[str, Field(max_length=20)] = "24h"
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = None


class EndpointBody(Body):
    """POST /v1/webhook_endpoints."""

    url: Annotated[str, Field(max_length=2_000)]
    event_types: Annotated[
        list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=20)
    ]
    name: Annotated[str, Field(max_length=200)] = ""


class EndpointChange(Body):
    """POST /v1/webhook_endpoints/{id}."""

    url: Annotated[str, Field(max_length=2_000)] | None = None
    event_types: (
        Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=20)]
        | None
    ) = None
    name: Annotated[str, Field(max_length=200)] | None = None


class RotateBody(Body):
    """POST /v1/webhook_endpoints/{id}/rotate_secret."""

    keep_old_secret_active_for_24_hours: bool = False


class EndpointTry(Body):
    """POST /v1/webhook_endpoints/{id}/test."""

    event_type: Annotated[str, Field(max_length=100)] = "video.completed"


class ModerationBody(Body):
    """POST /v1/moderations: texts and pictures to be checked."""

    takes_media = True
    input: Annotated[str, Field(max_length=MAX_TEXT)] | Annotated[list[Any], Field(max_length=100)]
    model: Annotated[str, Field(max_length=200)] | None = None


class ProvenanceBody(Body):
    """POST /v1/content_provenance_checks."""

    file: Annotated[Upload, WithJsonSchema({"type": "string", "format": "binary"})]


B = TypeVar("B", bound=Body)


def parse(kind: type[B], fields: Mapping[str, Any]) -> B:
    """A body's fields, checked. Raises WireError (400) for the first thing that is wrong, naming its parameter."""
    try:
        return kind.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )
    except ValidationError as error:
        raise _fault(error) from error


def read_reference(value: object, param: str) -> Reference:
    """A reference inside of a card. Raises WireError naming the parameter."""
    try:
        return _reference(value)
    except ValueError as error:
        raise invalid(param, f"Invalid type for '{param}': {error}.", "invalid_type") from error


def _fault(error: ValidationError) -> WireError:
    found = error.errors(include_url=False, include_context=False)[0]
    place = [
        step for step in found["loc"] if not (isinstance(step, str) and re.search(r"[^\w]", step))
    ]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(
        "."
    )
    param = re.sub(r"\.(constrained|function|float|str|int|bool|list|dict)\b.*", "", param)
    reason = found["msg"].removeprefix("Value error, ").rstrip(".")
    if found["type"] == "missing":
        return invalid(
            param, f"Missing required parameter: '{param}'.", "missing_required_parameter"
        )
    wrong_kind = found["type"].endswith(("_type", "_parsing")) or reason.startswith(
        "expected an object, but"
    )
    if wrong_kind:
        return invalid(
            param, f"Invalid type for '{param}': {reason[:1].lower()}{reason[1:]}.", "invalid_type"
        )
    return invalid(
        param, f"Invalid value for '{param}': {reason[:1].lower()}{reason[1:]}.", "invalid_value"
    )
