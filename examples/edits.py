"""Run edits of every verb and measure them: sheets, probe readings, kept frames.

python examples/edits.py [--only VERB ...] [--keep FOLDER]

Writes docs/images/editing/ and the part of docs/editing.md after "## Measured". Sources are
generated first, or taken from FOLDER. With --only, only the sheets of these verbs are written.
"""

import argparse
import json
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import reduce
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

import skyloom
from skyloom.generate.styles import find_style
from skyloom.generate.timeline import Generate, Keep
from skyloom.media.masks import open_mask, parse_region
from skyloom.media.sheet import write_sheet
from skyloom.media.source import open_source
from skyloom.models.diorama.probe import Probe, ProbePrediction, load_probe, predict

DOCS = Path(__file__).parent.parent / "docs"
SHEETS = DOCS / "images" / "editing"
HEADING = "## Measured"
_OPTIONS = {"start": "from", "stop": "to"}
MOMENTS = 8
SMALLER = 2  # the sheets show every edge at a half

SOURCES = {
    "car": ("a red car driving to the left in the city at night", 1),
    "cat": ("a cat walking to the right on the beach at sunset", 2),
    "whale": ("a whale swimming to the right underwater", 3),
    "dog": ("a dog running to the left in a meadow on a sunny day", 4),
    "rocket": ("a red rocket flying over the ocean on a sunny day", 5),
}


@dataclass(frozen=True)
class Case:
    """An edit; `wants` is what the probe should read in the changed part, as category:word."""

    verb: str
    sources: tuple[str, ...]
    prompt: str = ""
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    wants: str = ""

    @property
    def wanted(self) -> dict[str, str]:
        """Words by their categories."""
        return dict(pair.split(":", 1) for pair in self.wants.split())

    @property
    def command(self) -> str:
        """The command line of the edit."""
        values = {_OPTIONS.get(name, name): value for name, value in self.options.items()}
        if self.verb == "recut":
            values = {"keep": f"{values.pop('from')}-{values.pop('to')}", **values}
        videos = " ".join(f"{source}.mp4" for source in self.sources)
        prompt = f' "{self.prompt}"' if self.prompt else ""
        options = "".join(
            f" --{name}" if value is True else f" --{name} {shlex.quote(str(value))}"
            for name, value in values.items()
        )
        return f"skyloom edit {self.verb} {videos}{prompt}{options}"


def _remixes() -> tuple[Case, ...]:
    """The same change at every strength, and others at one."""
    snow = "a red car driving to the left in the snowy mountains on a sunny day"
    wants = "place:mountains time_of_day:day colour:red"
    return (
        *(
            Case("remix", ("car",), snow, {"strength": level}, wants)
            for level in ("subtle", "mild", "strong", 1)
        ),
        Case(
            "remix",
            ("cat",),
            "a cat walking to the right on the beach at night",
            {"strength": "strong"},
            "time_of_day:night place:beach noun:cat",
        ),
        Case(
            "remix",
            ("rocket",),
            "a green rocket flying over the ocean on a sunny day",
            {"strength": "strong"},
            "colour:green place:ocean noun:rocket",
        ),
    )


CASES = (
    *_remixes(),
    Case(
        "retake",
        ("car",),
        "a blue car driving to the left in the city at night",
        {"start": "0.5", "stop": "1.5"},
        "colour:blue place:city",
    ),
    Case(
        "retake",
        ("cat",),
        "a dog walking to the right on the beach at sunset",
        {"start": "0.5", "stop": "1.5"},
        "noun:dog place:beach",
    ),
    Case("retake", ("dog",), "", {"start": "0.75", "stop": "1.25"}, "place:meadow noun:dog"),
    Case("retake", ("whale",), "", {"start": "0", "stop": "1"}, "place:underwater noun:whale"),
    Case(
        "inpaint",
        ("car",),
        "a red balloon floating in the sky",
        {"region": "70,10,48,48"},
        "noun:balloon",
    ),
    Case("inpaint", ("dog",), "a butterfly in a meadow", {"region": "4,8,56,56"}, "noun:butterfly"),
    Case(
        "inpaint",
        ("whale",),
        "a fish swimming underwater",
        {"region": "64,64,60,60", "feather": 6},
        "noun:fish",
    ),
    Case(
        "inpaint",
        ("rocket",),
        "a sailboat on the ocean",
        {"region": "0,72,60,56@0; 60,72,60,56@2"},
        "noun:sailboat",
    ),
    Case("extend", ("car",), "", {"seconds": "2"}, "place:city time_of_day:night"),
    Case(
        "extend",
        ("cat",),
        "a cat walking to the right on the beach at night",
        {"seconds": "2"},
        "place:beach time_of_day:night",
    ),
    Case("extend", ("dog",), "", {"seconds": "1", "backward": True}, "place:meadow noun:dog"),
    Case(
        "extend", ("whale",), "", {"seconds": "3", "backward": True}, "place:underwater noun:whale"
    ),
    Case(
        "recut",
        ("car",),
        "",
        {"start": "0.5", "stop": "1.5", "seconds": "3"},
        "place:city noun:car",
    ),
    Case(
        "recut", ("cat",), "", {"start": "0", "stop": "1", "seconds": "3"}, "place:beach noun:cat"
    ),
    Case(
        "recut",
        ("rocket",),
        "",
        {"start": "1", "stop": "1.5", "seconds": "2"},
        "place:ocean noun:rocket",
    ),
    Case(
        "recut",
        ("whale",),
        "",
        {"start": "0.5", "stop": "1", "seconds": "2"},
        "place:underwater noun:whale",
    ),
    Case("loop", ("whale",), "", {"bridge": "1"}, "place:underwater"),
    Case("loop", ("dog",), "", {"bridge": "1"}, "place:meadow"),
    Case("loop", ("rocket",), "", {"bridge": "0.5"}, "place:ocean"),
    Case("loop", ("car",), "", {"start": "0.5", "stop": "1.5", "bridge": "1"}, "place:city"),
    Case("blend", ("car", "cat"), "", {"curve": "transition"}),
    Case("blend", ("dog", "rocket"), "", {"curve": "mix"}),
    Case("blend", ("whale", "rocket"), "", {"curve": "sample"}),
    Case("blend", ("cat", "dog"), "", {"curve": "0:0,0.8:1,1.2:1,2:0"}),
    Case("stitch", ("car", "cat")),
    Case("stitch", ("dog", "rocket"), "", {"morph": "1"}),
    Case("stitch", ("whale", "cat", "dog")),
    Case("stitch", ("cat", "car"), "", {"morph": "0"}),
    Case("restyle", ("car",), "", {"style": "snow"}, "place:mountains"),
    Case("restyle", ("cat",), "", {"style": "night"}, "time_of_day:night"),
    Case("restyle", ("dog",), "", {"style": "sunset", "strength": "strong"}, "time_of_day:sunset"),
    Case("restyle", ("rocket",), "", {"style": "night", "strength": "strong"}, "time_of_day:night"),
    Case("upscale", ("car",), "", {"size": "256x256"}),
    Case("upscale", ("dog",), "", {"size": "192x192"}),
    Case("interpolate", ("cat",), "", {"fps": "32"}),
    Case("interpolate", ("whale",), "", {"fps": "32"}),
)


@dataclass(frozen=True)
class Outcome:
    """Sources, result and measurements of a case."""

    case: Case
    before: list[UInt8[Tensor, "t h w c"]]
    after: UInt8[Tensor, "t h w c"]
    kept: float | None
    right: int
    read: str
    seam: float | None
    moved: float | None


def make(
    case: Case, pipeline: skyloom.Pipeline, probe: Probe, folder: Path, seed: int = 1
) -> Outcome:
    """Run an edit and measure it."""
    videos = tuple(str(folder / f"{source}.mp4") for source in case.sources)
    style = (
        {"style": find_style(str(case.options["style"]), None)} if "style" in case.options else {}
    )
    edit = {"verb": case.verb, "videos": videos, **case.options, **style}
    request = skyloom.Request(case.prompt, edit=edit)
    if request.needs_model:
        request = request.with_fields({"seed": seed})
    plan = pipeline.plan(request)
    video = pipeline.generate(request)
    sources = [open_source(name) for name in videos]
    before = [source.read(0, source.frames) for source in sources]
    assert plan.timeline is not None
    assert video.receipt is not None
    kept, changed, under, at = [], [], [], 0
    for span in plan.timeline.spans:
        run = video.frames[at : at + span.frames]
        at += span.frames
        if isinstance(span, Keep):
            kept.append(
                torch.equal(run, before[span.clip.source][span.clip.start : span.clip.stop])
            )
        elif isinstance(span, Generate):
            changed.append(run)
            under += [
                before[0][clip.start : clip.stop]
                for clip in span.init_clips[:1]
                if len(span.init_clips) == 1
            ]
    if "region" in edit:
        mask = open_mask(parse_region(str(edit["region"])), plan.shape, plan.fps).read(
            0, plan.shape.frames
        )
        kept.append(torch.equal(video.frames[~mask], before[0][~mask]))
        changed, under = [boxed(video.frames, mask)], [boxed(before[0], mask)]
    part = torch.cat(changed) if changed else video.frames
    reading = predict(probe, part)
    notes = video.receipt.get("notes")
    assert isinstance(notes, dict)
    ratios = [*notes.get("seams", {}).values(), *([notes["closure"]] if "closure" in notes else [])]
    return Outcome(
        case,
        before,
        video.frames,
        kept=sum(kept) / len(kept) if kept else None,
        right=sum(getattr(reading, name) == wanted for name, wanted in case.wanted.items()),
        read=words(case, reading),
        seam=max(ratios) if ratios else None,
        moved=float((part.float() - torch.cat(under).float()).abs().mean()) if under else None,
    )


def boxed(frames: UInt8[Tensor, "t h w c"], mask: Tensor) -> UInt8[Tensor, "t h w c"]:
    """Frames cut to the box of what is masked in each; boxes that move are of one size."""
    parts = []
    for frame, here in zip(frames, mask, strict=True):
        rows, columns = here.any(1).nonzero().flatten(), here.any(0).nonzero().flatten()
        parts.append(frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    height, width = min(part.shape[0] for part in parts), min(part.shape[1] for part in parts)
    return torch.stack([part[:height, :width] for part in parts])


def words(case: Case, reading: ProbePrediction) -> str:
    """What the probe reads where something is wanted, wrong words in bold."""
    found = [(getattr(reading, name), wanted) for name, wanted in case.wanted.items()]
    return ", ".join(word if word == wanted else f"**{word}**" for word, wanted in found)


def write_verb(outcomes: Sequence[Outcome], path: Path) -> None:
    """A sheet with the sources above their results."""
    rows: list[tuple[str, Tensor]] = []
    above: tuple[str, ...] = ()
    for one in outcomes:
        if one.case.sources != above:
            rows += [
                (f"{name}.mp4", small(frames))
                for name, frames in zip(one.case.sources, one.before, strict=True)
            ]
        above = one.case.sources
        rows.append(
            (one.case.command.removeprefix(f"skyloom edit {one.case.verb} "), small(one.after))
        )
    write_sheet(rows, path, moments=MOMENTS)
    with Image.open(path) as sheet:
        fewer = sheet.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    fewer.save(path, optimize=True)


def small(frames: UInt8[Tensor, "t h w c"]) -> UInt8[Tensor, "t h w c"]:
    """Frames at about 64 pixels, the mean of what each pixel covers."""
    by = max(SMALLER, frames.shape[1] // 64)
    cut = frames[:, : frames.shape[1] // by * by, : frames.shape[2] // by * by].float()
    return reduce(cut, "t (h p) (w q) c -> t h w c", "mean", p=by, q=by).round().to(torch.uint8)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A row for each edit, and what they come to for each verb."""
    lines = [
        "| edit | read in the changed part | kept, bit for bit | worst seam | moved |",
        "|---|---|---|---|---|",
    ]
    by_verb: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        by_verb[one.case.verb].append(one)
        kept = "" if one.kept is None else "yes" if one.kept == 1 else "**no**"
        seam = "" if one.seam is None else f"{one.seam:.1f}"
        moved = "" if one.moved is None else f"{one.moved:.1f}"
        lines.append(
            f"| `{one.case.command.removeprefix('skyloom edit ')}` "
            f"| {one.read} | {kept} | {seam} | {moved} |"
        )
    lines += ["", "| verb | edits | read right | kept, bit for bit |", "|---|---|---|---|"]
    for verb, members in by_verb.items():
        right = sum(one.right for one in members)
        total = sum(len(one.case.wanted) for one in members)
        checked = [one.kept == 1 for one in members if one.kept is not None]
        exact = f"{sum(checked)} of {len(checked)}" if checked else ""
        share = f"{right} of {total}" if total else ""
        lines.append(f"| {verb} | {len(members)} | {share} | {exact} |")
    return lines


def write_page(outcomes: Sequence[Outcome]) -> None:
    """The measured part of docs/editing.md anew."""
    page = DOCS / "editing.md"
    lines = [
        HEADING,
        "",
        f"{len(outcomes)} edits with seed 1 and the default quality, by `make edits`. The probe",
        "reads only the changed part: the generated frames, or the region. *Worst seam* is the",
        "largest change at a seam over the ordinary change between frames; *moved* is the mean",
        "difference of pixel values (of 255) from the source. Wrong readings are bold.",
        "",
        *table(outcomes),
    ]
    head = (
        page.read_text(encoding="utf-8").split(HEADING)[0].rstrip()
        if page.exists()
        else "# Editing"
    )
    page.write_text("\n".join([head, "", *lines]) + "\n", encoding="utf-8")


def main() -> None:
    """Make the sources, then the edits, then the sheets and the table."""
    verbs = list(dict.fromkeys(case.verb for case in CASES))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=verbs, default=verbs)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    pipeline, probe = skyloom.load("diorama"), load_probe()
    SHEETS.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (prompt, seed) in SOURCES.items():
            if not (folder / f"{name}.mp4").exists():
                made: skyloom.Video = pipeline.generate(prompt, seed=seed)
                made.save(folder / f"{name}.mp4")
        for verb in given.only:
            members = []
            for case in (case for case in CASES if case.verb == verb):
                members.append(make(case, pipeline, probe, folder))
                one = members[-1]
                row = {
                    "edit": case.command,
                    "read": one.read,
                    "kept": one.kept,
                    "seam": one.seam,
                    "moved": one.moved,
                }
                print(json.dumps(row), flush=True)
            write_verb(members, SHEETS / f"{verb}.png")
            outcomes += members
    if given.only == verbs:
        write_page(outcomes)


if __name__ == "__main__":
    main()
