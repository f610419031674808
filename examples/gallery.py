"""Generate the gallery: 24 prompts, contact sheets, GIFs, probe readings and digests.

python examples/gallery.py [--only N]

Writes docs/gallery.md and docs/images/gallery*, and compares the frames with docs/gallery.sha256:
on a CPU they should be equal for any number of threads. With --only, the first N prompts are
generated and nothing is written.
"""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import skyloom
from skyloom.media.sheet import write_sheet
from skyloom.media.write import write_video
from skyloom.models.diorama.probe import ProbePrediction, load_probe, predict

DOCS = Path(__file__).parent.parent / "docs"
EVERY = 2  # the GIFs show every second frame
COLUMNS, ROWS = 2, 6


@dataclass(frozen=True)
class Entry:
    """A prompt, its seed, and what the probe should read: only what the prompt says."""

    prompt: str
    seed: int = 1
    nouns: tuple[str, ...] = ()
    place: str = ""
    colour: str = ""
    direction: str = ""
    time_of_day: str = ""


ENTRIES = (
    Entry(
        "a red car driving to the left on the beach at sunset",
        1,
        ("car",),
        "beach",
        "red",
        "left",
        "sunset",
    ),
    Entry("a whale swimming to the right underwater", 1, ("whale",), "underwater", "", "right"),
    Entry(
        "a red rocket flying over the ocean at sunset", 1, ("rocket",), "ocean", "red", "", "sunset"
    ),
    Entry(
        "a penguin walking to the right in the snow in daylight",
        1,
        ("penguin",),
        "mountains",
        "",
        "right",
        "day",
    ),
    Entry(
        "a yellow balloon floating in the sky during the day",
        1,
        ("balloon",),
        "sky",
        "yellow",
        "",
        "day",
    ),
    Entry("a kitten in a meadow on a sunny day", 1, ("cat",), "meadow", "", "", "day"),
    Entry(
        "a green dragon flying to the left over the sea at night",
        1,
        ("dragon",),
        "ocean",
        "green",
        "left",
        "night",
    ),
    Entry(
        "an elephant walking in the desert at sunset", 1, ("elephant",), "desert", "", "", "sunset"
    ),
    Entry(
        "a bus driving to the right in the city at night", 1, ("bus",), "city", "", "right", "night"
    ),
    Entry("an octopus at the bottom of the ocean", 1, ("octopus",), "underwater"),
    Entry("a helicopter flying to the left in the sky", 1, ("helicopter",), "sky", "", "left"),
    Entry(
        "a sailboat sailing to the right on the ocean at sunset",
        1,
        ("sailboat",),
        "ocean",
        "",
        "right",
        "sunset",
    ),
    Entry("a ufo hovering in the desert at night", 1, ("ufo",), "desert", "", "", "night"),
    Entry("a robot walking to the left in the city", 1, ("robot",), "city", "", "left"),
    Entry("a soccer ball bouncing in a meadow", 1, ("soccer ball",), "meadow"),
    Entry("a dinosaur walking to the left in the desert", 1, ("dinosaur",), "desert", "", "left"),
    Entry(
        "a parrot flying to the right in the sky at sunset",
        1,
        ("parrot",),
        "sky",
        "",
        "right",
        "sunset",
    ),
    Entry(
        "a blue fish swimming to the left underwater", 1, ("fish",), "underwater", "blue", "left"
    ),
    Entry("a turtle on the beach, the camera zooms in", 1, ("turtle",), "beach"),
    Entry(
        "a horse running to the left in a meadow in the rain", 1, ("horse",), "meadow", "", "left"
    ),
    Entry(
        "a rabbit hopping to the right in the snow at night",
        1,
        ("rabbit",),
        "mountains",
        "",
        "right",
        "night",
    ),
    Entry(
        "a car and a bus driving to the right in the city", 1, ("car", "bus"), "city", "", "right"
    ),
    Entry("a dog next to a cat on the beach", 1, ("dog", "cat"), "beach"),
    Entry(
        "a dolphin and a fish swimming to the left underwater",
        1,
        ("dolphin", "fish"),
        "underwater",
        "",
        "left",
    ),
)


def describe_reading(entry: Entry, reading: ProbePrediction) -> str:
    """The probe's readings, wrong ones in bold."""
    found = reading.things[: len(entry.nouns)] if len(entry.nouns) > 1 else (reading.noun,)
    parts = [(" and ".join(found), set(found) == set(entry.nouns))]
    for name in ("place", "colour", "direction", "time_of_day"):
        expected = getattr(entry, name)
        if expected:
            word = getattr(reading, name)
            parts.append((word, word == expected))
    return ", ".join(word if right else f"**{word}** (wrong)" for word, right in parts)


def write_pages(
    videos: list[skyloom.Video], readings: list[ProbePrediction], digests: list[str]
) -> None:
    """The page, its pictures and the digests."""
    images = DOCS / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Gallery: twenty-four prompts, nothing picked out",
        "",
        "Generated by `make gallery` with the bundled model, its default quality and seed 1. CPUs",
        "with the same kernels give the same frames (digests: [gallery.sha256](gallery.sha256)).",
        "Below each picture are the readings of the [probe](model-card.md), wrong ones in bold.",
        "The GIFs show every second frame.",
        "",
    ]
    for part in range(0, len(ENTRIES), COLUMNS * ROWS):
        rows = [
            (entry.prompt, videos[part + at].frames)
            for at, entry in enumerate(ENTRIES[part : part + COLUMNS * ROWS])
        ]
        number = part // (COLUMNS * ROWS) + 1
        write_sheet(rows, DOCS / "images" / f"gallery-{number}.png", columns=COLUMNS)
        lines += [f"![Contact sheet {number}](images/gallery-{number}.png)", ""]
    for number, (entry, video, reading) in enumerate(
        zip(ENTRIES, videos, readings, strict=True), 1
    ):
        write_video(video.frames[::EVERY], video.fps / EVERY, images / f"{number:02}.gif")
        command = f'skyloom generate "{entry.prompt}" --seed {entry.seed}'
        lines += [
            f"![{entry.prompt}](images/gallery/{number:02}.gif)",
            "",
            f"`{command}`  ",
            describe_reading(entry, reading),
            "",
        ]
    (DOCS / "gallery.md").write_text("\n".join(lines).rstrip() + "\n")
    sums = [
        f"{digest}  {entry.seed}  {entry.prompt}"
        for digest, entry in zip(digests, ENTRIES, strict=True)
    ]
    (DOCS / "gallery.sha256").write_text("\n".join(sums) + "\n")


def main() -> None:
    """Make the videos, compare their digests, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=len(ENTRIES))
    given = parser.parse_args()
    pipeline, probe = skyloom.load("diorama"), load_probe()
    known = (
        (DOCS / "gallery.sha256").read_text().splitlines()
        if (DOCS / "gallery.sha256").exists()
        else []
    )
    before = {line.split(maxsplit=1)[1]: line.split()[0] for line in known}
    videos, readings, digests, same = [], [], [], 0
    for entry in ENTRIES[: given.only]:
        videos.append(pipeline.generate(entry.prompt, seed=entry.seed))
        readings.append(predict(probe, videos[-1].frames))
        digests.append(hashlib.sha256(videos[-1].frames.numpy().tobytes()).hexdigest())
        same += before.get(f"{entry.seed}  {entry.prompt}") == digests[-1]
        print(f"{entry.prompt}: {describe_reading(entry, readings[-1])}")
    if given.only >= len(ENTRIES):
        write_pages(videos, readings, digests)
    print(f"{same} of {len(videos)} videos have the frames of docs/gallery.sha256.")


if __name__ == "__main__":
    main()
