"""Ten prompts as a new user would type them, with the default settings and seed 1: one contact sheet.

python examples/gallery.py [docs/images/gallery.png]
"""

import sys
from pathlib import Path

import skyloom
from skyloom.media.sheet import write_sheet

PROMPTS = (
    "a red car driving to the left on the beach at sunset",
    "a whale swimming underwater",
    "a red rocket flying over the ocean at sunset",
    "a penguin walking to the right in the snow on a sunny day",
    "a yellow balloon floating in the sky during the day",
    "a kitten in a meadow on a sunny day",
    "a green dragon flying to the left over the sea at night",
    "an elephant walking in the desert at sunset",
    "a bus driving to the right in the city at night",
    "an octopus at the bottom of the ocean",
)


def main() -> None:
    """Make the videos and the sheet."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/gallery.png")
    pipeline = skyloom.load("diorama")
    rows = [(prompt, pipeline.generate(prompt, seed=1).frames) for prompt in PROMPTS]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(rows, target, columns=2)


if __name__ == "__main__":
    main()
