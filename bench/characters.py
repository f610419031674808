"""Who a character's clip shows: how sure the probe must be, and what it changes in the videos that are made.

python bench/characters.py bounds --atlas .atlas [--photos FOLDER]     # how many are believed, and rightly, by bounds
python bench/characters.py videos --atlas .atlas [--count 20]          # videos of a named character, as the probe reads

Clips are rendered from seeds that no training has seen, written as mp4 without a receipt, and read as the server reads
them. Videos are made three times by one seed: with who was read in the place of the name, with the name alone, and
with who it truly is. Prints one JSON line.
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
from skyloom.core.errors import MediaError
from skyloom.evaluate.probe import Probe, load_probe, predict
from skyloom.evaluate.subject_recognition import classify_subject, recognize_subject
from skyloom.media.frames import cover
from skyloom.media.read import read_image
from skyloom.media.write import write_video
from skyloom.serve.api.character_prompts import substitute_characters
from skyloom.serve.queue.library import CharacterLikeness
from skyloom.world.assets import Atlas, load_atlas
from skyloom.world.make import Clip, make_clip
from skyloom.world.places import PLACES
from skyloom.world.scene import sample_scene
from skyloom.world.vocabulary import DIORAMA, FULL, Vocabulary

RENDERED, OTHERS, VIDEOS = (
    20_900_000,
    20_950_000,
    20_970_000,
)  # seeds of evaluation: training has none from 20 million to 21
NAME, FPS, FRAMES = "Mossy", 16, 33
CLIPS = 300
BOUNDS = (0.5, 0.8, 0.9, 0.95)


def clips(
    first: int, count: int, atlas: Atlas, vocabulary: Vocabulary, nouns: frozenset[str]
) -> Iterator[Clip]:
    """Rendered clips whose first thing is one of some nouns."""
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
    """Noise, and soft blobs of colour, both of which show nothing."""
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
    """Pans over the pictures of a folder, four each: the whole, and three parts."""
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
    """Of every kind of clip, the share in which the probe is believed, by the score of its noun that is asked for."""
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
    told: dict[str, object] = {kind: len(videos) for kind, videos in kinds.items()}
    for bound in BOUNDS:
        believed = {
            kind: [one for one in readings if _believed(one.scores, bound)]
            for kind, readings in found.items()
        }
        pairs = zip(found["its own things"], shown, strict=True)
        right = sum(_believed(one.scores, bound) == facts.noun for one, (_, facts) in pairs)
        told[f"noun at {bound}"] = {
            **{kind: len(those) for kind, those in believed.items()},
            "right": right,
        }
        coloured = [
            (one, facts.colour)
            for one, (_, facts) in zip(found["its own things"], shown, strict=True)
        ]
        said = [(_coloured(one.scores, bound), truly) for one, truly in coloured]
        right = sum(one is not None and one == truly for one, truly in said)
        there = sum(truly is not None for _, truly in said)
        told[f"colour at {bound}"] = {
            "said": sum(one is not None for one, _ in said),
            "right": right,
            "there": there,
        }
    return told


def _believed(scores: dict[str, float], bound: float) -> str | None:
    """The noun that both ways of looking say, the first with that score."""
    (noun, share), (thing, there), _ = scores.items()
    same = noun.removeprefix("noun ") == thing.removeprefix("thing ")
    return noun.removeprefix("noun ") if same and share >= bound and there >= 0.5 else None


def _coloured(scores: dict[str, float], bound: float) -> str | None:
    colour, share = list(scores.items())[2]
    return None if colour == "colour none" or share < bound else colour.removeprefix("colour ")


def videos(given: argparse.Namespace, probe: Probe) -> dict[str, object]:
    """How often the probe sees the true noun and colour in videos of a character, by what the prompt says of it."""
    atlas, pipeline = load_atlas(given.atlas), skyloom.load()
    cast = clips(VIDEOS, given.count, atlas, DIORAMA, frozenset(probe.config.nouns))
    ways = ("read", "name only", "truly")
    nouns, colours = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    read_well, unsure, coloured = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, clip in enumerate(cast):
            path = write_video(clip.frames, FPS, Path(folder) / f"{number}.mp4")
            found, facts = recognize_subject(path), clip.facts
            read_well += found.noun == facts.noun
            unsure += found.noun is None
            coloured += facts.colour is not None
            asked = f"{NAME} {PLACES[facts.place].phrases[0]}"
            known = {
                "read": CharacterLikeness(found.noun, found.colour),
                "truly": CharacterLikeness(facts.noun, facts.colour),
            }
            for way in ways:
                prompt = substitute_characters(asked, {NAME: known.get(way, CharacterLikeness())})[
                    0
                ]
                seen = predict(probe, pipeline.generate(prompt, seed=number).frames)
                nouns[way] += seen.noun == facts.noun
                colours[way] += facts.colour is not None and seen.colour == facts.colour
    told = {
        "clips": given.count,
        "read rightly": read_well,
        "unsure": unsure,
        "with a colour": coloured,
    }
    return {**told, "noun seen": nouns, "colour seen": colours}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bounds", "videos"])
    parser.add_argument("--atlas", type=Path, default=Path(".atlas"))
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, default=20)
    given = parser.parse_args()
    print(json.dumps({"bounds": bounds, "videos": videos}[given.what](given, load_probe())))


if __name__ == "__main__":
    main()
