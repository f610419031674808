"""Request bodies as pydantic models.

Field names are OpenAI's; unknown fields are ignored, since its clients add some with every version.
skyloom's own fields (seed, fps, steps, guidance, ...) are optional everywhere. Numbers may be text,
as multipart sends them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

from skyloom.core.errors import RequestError
from skyloom.generate.loras import MAX_LORA_WEIGHT, MAX_LORAS, Lora
from skyloom.safety.consent import parse_expiry
from skyloom.serve.api.body import Upload, load_json
from skyloom.serve.api.errors import explain_invalid, invalid
from skyloom.serve.api.numbers import find_number, plain_number

MAX_URL = 20_971_520  # characters of image_url, as OpenAI has it
MAX_CHARACTERS = 2
MAX_VARIATIONS = 8
MAX_SECONDS = 3600
MAX_CARDS = 500
MAX_VIDEOS = 20
MAX_TEXT = 32_000  # characters
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
    """A picture or video: an uploaded file, a stored file, a URL (also data:) or a job's video."""

    upload: Upload | None = None
    file_id: str | None = None
    url: str | None = None
    video_id: str | None = None


def _reference(value: object) -> Reference:
    """Parse any spelling of a reference. Raises ValueError with OpenAI's wording."""
    if isinstance(value, Reference):
        return value
    if isinstance(value, Upload):
        return Reference(upload=value)
    value = _decode_json(value)
    if isinstance(value, str) and value.startswith("data:"):
        value = {"image_url": value}
    elif isinstance(value, str) and re.fullmatch(r"(video|file)[-_][\w-]{1,100}", value, re.ASCII):
        value = {"id" if value.startswith("video") else "file_id": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, but got {_type_name(value)} instead")
    return _from_object(cast("Mapping[str, object]", value))


def _from_object(table: Mapping[str, object]) -> Reference:
    """Parse an object with exactly one of the reference's keys."""
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


def _decode_json(value: object) -> object:
    """Decode JSON text of a form field; return everything else unchanged."""
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


def _type_name(value: object) -> str:
    """The JSON type of a value, with its article."""
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
WholeNumber = Annotated[int, BeforeValidator(plain_number)]
Number = Annotated[float, BeforeValidator(plain_number)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
UnitInterval = Annotated[Number, Field(ge=0, le=1)]
VideoCount = Annotated[WholeNumber, Field(ge=1, le=MAX_VARIATIONS)]
Cards = Annotated[list[dict[str, Any]], BeforeValidator(_decode_json), Field(max_length=MAX_CARDS)]
VideoReferences = Annotated[
    list[AnyReference], BeforeValidator(_decode_json), Field(min_length=2, max_length=MAX_VIDEOS)
]


class RequestBody(BaseModel):
    """Base of request bodies; ignores unknown fields. `takes_media`: data URLs are allowed."""

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


class EmptyBody(RequestBody):
    """No fields: POST that cancels, pauses or resumes."""


class Consent(RequestBody):
    """Consent of the people in a picture or clip: who agreed, to what, until when."""

    who: Annotated[str, Field(max_length=500)] | None = None
    scope: Annotated[str, Field(max_length=500)] | None = None
    expiry: Annotated[str, Field(max_length=40), AfterValidator(_expiry)] | None = None


ConsentField = Annotated[Consent, BeforeValidator(_decode_json)]


class CharacterName(RequestBody):
    """A character by its id."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]


class LoraField(RequestBody):
    """A LoRA of the server's setting `loras`, and the factor of its effect."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    weight: Annotated[Number, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT)] = 1.0


def _loras(value: object) -> object:
    """Decode a list; a text is a name, or NAME:WEIGHT, and stands for a list of one, too."""
    value = _decode_json(value)
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [_lora(item) if isinstance(item, str) else item for item in items]
    return [_lora(value)] if isinstance(value, str) else value


def _lora(text: str) -> dict[str, Any]:
    try:
        return asdict(Lora.parse(text))
    except RequestError as error:
        raise ValueError(error.message) from error


LoraFields = Annotated[list[LoraField], BeforeValidator(_loras), Field(max_length=MAX_LORAS)]


class CommonFields(RequestBody):
    """skyloom's fields of every new video and edit; OpenAI's clients send them by `extra_body`."""

    takes_media = True
    seed: WholeNumber | None = None
    fps: Number | None = None
    steps: WholeNumber | None = None
    guidance: Number | None = None
    negative_prompt: Text = ""
    quality: Annotated[str, Field(max_length=40)] | None = None
    style: Annotated[str, Field(max_length=200)] | None = None
    loras: LoraFields = []
    consent: ConsentField | None = None


class CreateVideoBody(CommonFields):
    """POST /v1/videos."""

    prompt: Text
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Seconds | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    input_reference: AnyReference | None = None
    characters: Annotated[
        list[CharacterName], BeforeValidator(_decode_json), Field(max_length=MAX_CHARACTERS)
    ] = []
    strength: UnitInterval | None = None
    storyboard: Cards = []
    n: VideoCount = 1
    region: Annotated[str, Field(max_length=400)] | None = None


class StoryboardBody(CommonFields):
    """POST /v1/videos/storyboard: cards with times; `prompt` is added to each card's own."""

    cards: Annotated[Cards, Field(min_length=1)]
    prompt: Text = ""
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Seconds | None = None
    size: Annotated[str, Field(max_length=40)] | None = None


class EditFields(CommonFields):
    """Fields of all edit verbs; edit_fields.py has which verb takes which."""

    prompt: Text = ""
    model: Annotated[str, Field(max_length=200)] | None = None
    video: AnyReference | None = None
    videos: VideoReferences | None = None
    mask: AnyReference | None = None
    start: Annotated[Number, Field(ge=0)] | None = None
    stop: Annotated[Number, Field(ge=0)] | None = None
    seconds: Seconds | None = None
    strength: UnitInterval | Annotated[str, Field(max_length=20)] | None = None
    region: Annotated[str, Field(max_length=4_000)] | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    feather: Annotated[WholeNumber, Field(ge=0, le=256)] | None = None
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


class CharacterBody(RequestBody):
    """POST /v1/videos/characters."""

    takes_media = True
    name: Annotated[str, Field(min_length=1, max_length=100)]
    video: AnyReference
    consent: ConsentField | None = None


class FileBody(RequestBody):
    """POST /v1/files."""

    file: Annotated[Upload, WithJsonSchema({"type": "string", "format": "binary"})]
    purpose: Annotated[str, Field(max_length=40)] = "user_data"


class BatchBody(RequestBody):
    """POST /v1/batches."""

    input_file_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    endpoint: Annotated[str, Field(max_length=100)]
    completion_window: Annotated[str, Field(max_length=20)] = "24h"
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = None


class EndpointBody(RequestBody):
    """POST /v1/webhook_endpoints."""

    url: Annotated[str, Field(max_length=2_000)]
    event_types: Annotated[
        list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=20)
    ]
    name: Annotated[str, Field(max_length=200)] = ""


class EndpointChange(RequestBody):
    """POST /v1/webhook_endpoints/{id}."""

    url: Annotated[str, Field(max_length=2_000)] | None = None
    event_types: (
        Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=20)]
        | None
    ) = None
    name: Annotated[str, Field(max_length=200)] | None = None


class RotateBody(RequestBody):
    """POST /v1/webhook_endpoints/{id}/rotate_secret."""

    keep_old_secret_active_for_24_hours: bool = False


class EndpointTry(RequestBody):
    """POST /v1/webhook_endpoints/{id}/test."""

    event_type: Annotated[str, Field(max_length=100)] = "video.completed"


class ModerationBody(RequestBody):
    """POST /v1/moderations: texts and pictures."""

    takes_media = True
    input: Annotated[str, Field(max_length=MAX_TEXT)] | Annotated[list[Any], Field(max_length=100)]
    model: Annotated[str, Field(max_length=200)] | None = None


class ProvenanceBody(RequestBody):
    """POST /v1/content_provenance_checks."""

    file: Annotated[Upload, WithJsonSchema({"type": "string", "format": "binary"})]


B = TypeVar("B", bound=RequestBody)


def parse_body(model: type[B], fields: Mapping[str, Any]) -> B:
    """Validate the fields of a body. Raises ApiError (400) naming the first invalid parameter."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        raise explain_invalid([dict(one) for one in details]) from error


def read_reference(value: object, param: str) -> Reference:
    """Parse a reference inside of a card. Raises ApiError (400)."""
    try:
        return _reference(value)
    except ValueError as error:
        raise invalid(param, f"Invalid type for '{param}': {error}.", "invalid_type") from error
