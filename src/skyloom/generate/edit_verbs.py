"""The table of edit verbs: name, fields, required values, number of videos and timeline builder.

`Edit`, the command line, the API and the tests of all verbs derive from this table. A new verb is a
row here, a timeline builder, and a span (timeline.py) if its frames come about in a new way. A verb
that uses the model is also listed by the families that can do it (FAMILY.edit_verbs). Importing
this does not import torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from skyloom.generate import edit_timelines as timelines
from skyloom.generate.timeline import Timeline

if TYPE_CHECKING:
    from skyloom.generate.edit_spec import Edit

MAX_VIDEOS = 20
MAX_SECONDS = 3600
MAX_FEATHER = 256
STRENGTHS: Mapping[str, float] = {"subtle": 0.5, "mild": 0.7, "strong": 0.85}

FieldKind = Literal["time", "strength", "integer", "flag", "text", "file", "size", "rate"]
Builder = Callable[["Edit", str, Sequence[timelines.SourceInfo], Fraction], Timeline]


@dataclass(frozen=True)
class EditField:
    """A parameter of an edit verb.

    Kinds: "time" (seconds: 2.5, "1:02.5", "13/16"), "strength" (0 to 1, or a name in `choices`),
    "integer", "flag", "text", "file" (a path), "size" ("512x512"), "rate" (frames per second).
    `default` is used if the field is not set; None means that the verb computes it. `choices` of a
    text field are the named values; other values are parsed by the verb.
    """

    name: str
    kind: FieldKind
    description: str
    default: str | float | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditVerb:
    """An edit verb. `required` holds field names and "prompt".

    Without `uses_model` it never generates frames: no prompt, no settings of sampling, any model.
    With `resamples_sources` its videos are opened at the model's size and rate, else at their own.
    `build(edit, prompt, sources, fps)` returns the timeline; it raises RequestError for times that
    the sources do not have.
    """

    name: str
    summary: str
    fields: tuple[EditField, ...]
    required: tuple[str, ...]
    build: Builder
    min_videos: int = 1
    max_videos: int = 1
    uses_model: bool = True
    resamples_sources: bool = True

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(field.name for field in self.fields)

    def field(self, name: str) -> EditField | None:
        """The field of that name, if the verb has it."""
        return next((field for field in self.fields if field.name == name), None)


def _time(name: str, description: str, default: str | None = None) -> EditField:
    return EditField(name, "time", description, default, minimum=0, maximum=MAX_SECONDS)


def _strength(default: float) -> EditField:
    return EditField(
        "strength",
        "strength",
        "Distance from the source: 0 (unchanged) to 1 (unconstrained), subtle, mild or strong.",
        default=default,
        minimum=0,
        maximum=1,
        choices=tuple(STRENGTHS),
    )


_START = _time("start", 'Start of the range in seconds, like 2.5 or "1:02.5".', "0")
_STOP = _time("stop", "End of the range in seconds (default: the end of the video)")
_OVERLAP = _time("overlap", "Seconds of the source that condition the new frames (default: 2)")

_VERBS = (
    EditVerb(
        name="remix",
        summary="Generate the whole video again from another prompt.",
        fields=(_strength(0.8),),
        required=("prompt",),
        build=timelines.build_remix,
    ),
    EditVerb(
        name="restyle",
        summary="Change the style, light or weather of the whole video.",
        fields=(
            EditField("style", "text", "Name of a style: `skyloom styles` lists them."),
            _strength(0.8),
        ),
        required=("style",),
        build=timelines.build_restyle,
    ),
    EditVerb(
        name="retake",
        summary="Generate a time range again; the frames before and after it are kept.",
        fields=(_START, _STOP, _strength(1.0)),
        required=(),
        build=timelines.build_retake,
    ),
    EditVerb(
        name="inpaint",
        summary="Generate a region again; no pixel outside it changes.",
        fields=(
            EditField(
                "region",
                "text",
                "Box x,y,w,h in pixels or %, a time range @1-2.5, or keys x,y,w,h@0; x,y,w,h@2.",
            ),
            EditField("mask", "file", "Picture or video: white is generated, black is kept."),
            EditField(
                "feather",
                "integer",
                "Width of the soft edge in pixels.",
                default=4,
                minimum=0,
                maximum=MAX_FEATHER,
            ),
            _strength(1.0),
        ),
        required=("prompt",),
        build=timelines.build_inpaint,
    ),
    EditVerb(
        name="extend",
        summary="Add frames at the end or at the start.",
        fields=(
            _time("seconds", "Seconds to add."),
            # backward in time: new frames come before the source, whose frames keep their order
            EditField("backward", "flag", "Add at the start instead of the end."),
            _OVERLAP,
        ),
        required=("seconds",),
        build=timelines.build_extend,
    ),
    EditVerb(
        name="recut",
        summary="Keep a time range and generate frames on both sides of it.",
        fields=(_START, _STOP, _time("seconds", "Length of the result in seconds."), _OVERLAP),
        required=("seconds",),
        build=timelines.build_recut,
    ),
    EditVerb(
        name="loop",
        summary="Make a seamless loop: generate frames from the end back to the start.",
        fields=(_START, _STOP, _time("bridge", "Seconds to generate between end and start.", "1")),
        required=(),
        build=timelines.build_loop,
    ),
    EditVerb(
        name="blend",
        summary="Combine two videos: a transition, a mix, or a curve of shares.",
        fields=(
            EditField(
                "curve",
                "text",
                'transition, mix, sample, or times and shares of the second: "0:0,1.5:1,3:0".',
                default="transition",
                choices=timelines.CURVES,
            ),
            _time("seconds", "Length of a transition in seconds (default: 1)"),
            _strength(0.6),
        ),
        required=(),
        min_videos=2,
        max_videos=2,
        build=timelines.build_blend,
    ),
    EditVerb(
        name="stitch",
        summary="Join videos with generated transitions or hard cuts.",
        fields=(_time("morph", "Seconds of each transition; 0 is a hard cut.", "0.5"),),
        required=(),
        min_videos=2,
        max_videos=MAX_VIDEOS,
        build=timelines.build_stitch,
    ),
    EditVerb(
        name="upscale",
        summary="Enlarge with a Lanczos filter.",
        fields=(EditField("size", "size", "Width x height in pixels, like 512x512."),),
        required=("size",),
        uses_model=False,
        resamples_sources=False,
        build=timelines.build_upscale,
    ),
    EditVerb(
        name="interpolate",
        summary="Raise the frame rate by motion interpolation; existing frames are kept.",
        fields=(EditField("fps", "rate", "Frames per second, more than the video has."),),
        required=("fps",),
        uses_model=False,
        resamples_sources=False,
        build=timelines.build_interpolate,
    ),
)

EDIT_VERBS: Mapping[str, EditVerb] = {verb.name: verb for verb in _VERBS}
VERBS_WITHOUT_MODEL = tuple(verb.name for verb in _VERBS if not verb.uses_model)
