"""Measure subject recognition in characters' clips, and its effect on generated videos.

python projects/diorama/bench/characters.py bounds --atlas .atlas [--photos FOLDER]
python projects/diorama/bench/characters.py videos --atlas .atlas [--count 20]

`bounds` counts accepted and correct predictions of the probe at several thresholds. `videos`
generates each video three times from one seed, with the character's name replaced by the recognized
subject, not replaced, or replaced by the true subject, and counts what the probe sees. Clips are
rendered from seeds outside of the training data, written as mp4 without a receipt and read as the
server reads them. Prints one JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import skyloom
from diorama.world.assets import Atlas, load_atlas
from diorama.world.make import RenderedClip, make_clip
from diorama.world.places import PLACES
from diorama.world.scene import sample_scene
from diorama.world.vocabulary import DIORAMA, FULL, Vocabulary
from skyloom.core.errors import MediaError
from skyloom.evaluate.subject_recognition import classify_subject, recognize_subject
from skyloom.media.frames import cover
from skyloom.media.read import read_image
from skyloom.media.write import write_video
from skyloom.models.diorama.probe import Probe, load_probe, predict
from skyloom.serve.api.character_prompts import substitute_characters
from skyloom.serve.queue.library import CharacterLikeness

# First seeds; training uses none between 20 and 21 million.
RENDERED = 20_900_000
OTHERS = 20_950_000
VIDEOS = 20_970_000
NAME = "Mossy"
FPS = 16
FRAMES = 33
CLIPS = 300
BOUNDS = (0.5, 0.8, 0.9, 0.95)


def clips(
    first: int, count: int, atlas: Atlas, vocabulary: Vocabulary, nouns: frozenset[str]
) -> Iterator[RenderedClip]:
    """Render clips whose first subject is one of `nouns`."""
    seed = first
    while count:
        if (
            sample_scene(seed, vocabulary, FRAMES, 128, 128, FPS, nouns=atlas.nouns)
            .subjects[0]
            .noun
            in nouns
        ):
            yield make_clip(seed, vocabulary, atlas)
            count -= 1
        seed += 1


def textures(count: int) -> Iterator[Tensor]:
    """Generate clips without a subject: noise, and moving blobs of colour."""
    drawn = torch.Generator().manual_seed(0)
    for index in range(count):
        yield torch.randint(0, 256, (5, 128, 128, 3), generator=drawn, dtype=torch.uint8)
        side = 2 << (index % 5)
        blobs = F.interpolate(
            torch.rand(1, 3, side, side, generator=drawn), (140, 140), mode="bicubic"
        ).clamp(0, 1)
        moved = [
            blobs[0, :, at : at + 128, at : at + 128].permute(1, 2, 0) * 255 for at in range(5)
        ]
        yield torch.stack(moved).to(torch.uint8)


def photos(folder: Path) -> Iterator[Tensor]:
    """Generate four pans over every picture of a folder: over the whole, and over three crops."""
    for path in sorted(folder.iterdir()):
        try:
            picture = read_image(path)
        except MediaError:
            continue
        height, width = picture.shape[1:3]
        for number in range(4):
            drawn = torch.Generator().manual_seed(number)
            side = int(min(height, width) * (0.6 if number else 1))
            top = int(torch.randint(0, height - side + 1, (1,), generator=drawn))
            left = int(torch.randint(0, width - side + 1, (1,), generator=drawn))
            steps = [min(width - side, left + 2 * step) for step in range(5)]
            yield torch.cat(
                [cover(picture[:, top : top + side, x : x + side], 128, 128) for x in steps]
            )


def bounds(given: argparse.Namespace, probe: Probe) -> dict[str, object]:
    """Count accepted and correct predictions for every kind of clip, by threshold."""
    atlas, known = load_atlas(given.atlas), frozenset(probe.config.nouns)
    shown = [(clip.frames, clip.facts) for clip in clips(RENDERED, CLIPS, atlas, DIORAMA, known)]
    others = clips(OTHERS, CLIPS // 2, atlas, FULL, frozenset(atlas.nouns) - known)
    kinds = {
        "its own things": [frames for frames, _ in shown],
        "other things": [clip.frames for clip in others],
        "noise and blobs": list(textures(100)),
        "photographs": [] if given.photos is None else list(photos(given.photos)),
    }
    found = {
        kind: [classify_subject(probe, frames) for frames in videos]
        for kind, videos in kinds.items()
    }
    results: dict[str, object] = {kind: len(videos) for kind, videos in kinds.items()}
    for bound in BOUNDS:
        believed = {
            kind: [one for one in readings if _believed(one.scores, bound)]
            for kind, readings in found.items()
        }
        pairs = zip(found["its own things"], shown, strict=True)
        right = sum(_believed(one.scores, bound) == facts.noun for one, (_, facts) in pairs)
        results[f"noun at {bound}"] = {
            **{kind: len(those) for kind, those in believed.items()},
            "right": right,
        }
        coloured = [
            (one, facts.colour)
            for one, (_, facts) in zip(found["its own things"], shown, strict=True)
        ]
        pairs_of_colours = [(_coloured(one.scores, bound), truth) for one, truth in coloured]
        results[f"colour at {bound}"] = {
            "said": sum(one is not None for one, _ in pairs_of_colours),
            "right": sum(one is not None and one == truth for one, truth in pairs_of_colours),
            "there": sum(truth is not None for _, truth in pairs_of_colours),
        }
    return results


def _believed(scores: dict[str, float], bound: float) -> str | None:
    """Return the noun if both heads of the probe agree and the first one reaches the threshold."""
    (noun, share), (thing, there), _ = scores.items()
    same = noun.removeprefix("noun ") == thing.removeprefix("thing ")
    return noun.removeprefix("noun ") if same and share >= bound and there >= 0.5 else None


def _coloured(scores: dict[str, float], bound: float) -> str | None:
    colour, share = list(scores.items())[2]
    return None if colour == "colour none" or share < bound else colour.removeprefix("colour ")


def videos(given: argparse.Namespace, probe: Probe) -> dict[str, object]:
    """Count videos in which the probe sees the true noun and colour, by kind of prompt."""
    atlas = load_atlas(given.atlas)
    pipeline = skyloom.load()
    cast = clips(VIDEOS, given.count, atlas, DIORAMA, frozenset(probe.config.nouns))
    ways = ("read", "name only", "truly")
    nouns = dict.fromkeys(ways, 0)
    colours = dict.fromkeys(ways, 0)
    correct = 0
    unsure = 0
    coloured = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, clip in enumerate(cast):
            path = write_video(clip.frames, FPS, Path(folder) / f"{number}.mp4")
            found = recognize_subject(path)
            facts = clip.facts
            correct += found.noun == facts.noun
            unsure += found.noun is None
            coloured += facts.colour is not None
            template = f"{NAME} {PLACES[facts.place].phrases[0]}"
            known = {
                "read": CharacterLikeness(found.noun, found.colour),
                "truly": CharacterLikeness(facts.noun, facts.colour),
            }
            for way in ways:
                likeness = known.get(way, CharacterLikeness())
                prompt = substitute_characters(template, {NAME: likeness})[0]
                seen = predict(probe, pipeline.generate(prompt, seed=number).frames)
                nouns[way] += seen.noun == facts.noun
                colours[way] += facts.colour is not None and seen.colour == facts.colour
    return {
        "clips": given.count,
        "read rightly": correct,
        "unsure": unsure,
        "with a colour": coloured,
        "noun seen": nouns,
        "colour seen": colours,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bounds", "videos"])
    parser.add_argument("--atlas", type=Path, default=Path(".atlas"))
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=20)
    given = parser.parse_args()
    print(json.dumps({"bounds": bounds, "videos": videos}[given.what](given, load_probe())))


if __name__ == "__main__":
    main()
