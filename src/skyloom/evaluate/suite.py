"""The tests a model is put to: does it show what was asked (adherence), what could be read at best (ceiling).

Every share stands beside its ceiling (real renders of the same scenes read by the same probe, also through
the autoencoder) and its floors (the same readings held against other prompts; a guess from the place alone):
a number without them says nothing. Standard errors count a prompt once, however many seeds it was made with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.evaluate.adherence import FIRST, JUDGES, SHUFFLED, Answer, floors, judge
from skyloom.evaluate.metrics import frechet_distance, psnr, ratio_with_interval, share_of, ssim
from skyloom.evaluate.probe import Probe, Reading, choose_frames, read
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Report, Strip
from skyloom.media.frames import to_frames, to_pixels
from skyloom.models.vae import Vae
from skyloom.world.assets import Atlas
from skyloom.world.render import render

GENERATED, REAL, RECONSTRUCTED = "generated", "real renders", "renders through the autoencoder"
_SHOWN = 5
_STRIPS = 60

Frames = UInt8[Tensor, "t h w c"]


@runtime_checkable
class Generator(Protocol):
    """What is measured: a pipeline, or anything else that makes a video from a sentence."""

    def generate(self, request: str, /, *, seed: int) -> "Made": ...


@runtime_checkable
class Made(Protocol):
    """A video: at least its frames."""

    @property
    def frames(self) -> Frames: ...


def adherence(
    pipeline: Generator,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    probe: Probe,
    *,
    atlas: Atlas | None = None,
    vae: Vae | None = None,
    commonest: Mapping[str, str] | None = None,
    on_video: Callable[[int, int], None] | None = None,
) -> Report:
    """Make every prompt with every seed and read it; without an atlas there are no ceilings.

    `commonest` names the likeliest noun of each place, for that floor. `on_video(done, total)` is told of
    progress.
    """
    answers, strips, cases = [], [], []
    for number, prompt in enumerate(prompts):
        readings = []
        for turn, seed in enumerate(seeds):
            frames = pipeline.generate(prompt.text, seed=seed).frames
            readings.append(read(probe, frames))
            cases.append({"seed": seed, "group": prompt.group, **_said(prompt, readings[-1])})
            if turn == 0 and len(strips) < _STRIPS:
                strips.append(_strip(frames, prompt, readings[-1]))
            if on_video:
                on_video(number * len(seeds) + turn + 1, len(prompts) * len(seeds))
        answers.append(Answer(prompt, tuple(readings)))
    sources = {GENERATED: answers}
    if atlas is not None:
        sources |= _ceilings(prompts, probe, atlas, vae)
    rows = [row for source, given in sources.items() for row in judge(given, source)]
    rows += floors(answers, commonest or {})
    about = {
        "prompts": len(prompts),
        "seeds": len(seeds),
        "probe": "trained on rendered clips only",
    }
    numbers = {**_of_ceiling(sources), **_distances(sources)}
    return Report("Prompt adherence", about, tuple(rows), numbers, tuple(cases), tuple(strips))


def ceiling(
    prompts: Sequence[Prompt], probe: Probe, atlas: Atlas, vae: Vae | None = None
) -> Report:
    """What the probe reads in real renders of the prompts' own scenes, and in their reconstructions."""
    sources = _ceilings(prompts, probe, atlas, vae)
    rows = [row for source, given in sources.items() for row in judge(given, source)]
    rows += [row for row in floors(sources[REAL], {}) if row.source == SHUFFLED]
    cases = [
        {"source": source, "group": answer.prompt.group, **_said(answer.prompt, answer.readings[0])}
        for source, given in sources.items()
        for answer in given
    ]
    return Report(
        "What the probe can read",
        {"scenes": len(prompts)},
        tuple(rows),
        _distances(sources),
        tuple(cases),
    )


def autoencoder(vae: Vae, videos: Mapping[str, Sequence[Frames]]) -> Report:
    """PSNR and SSIM of reconstructed videos per source, with standard errors over videos."""
    numbers, strips = {}, []
    for source, clips in videos.items():
        decibels, likenesses = [], []
        for index, frames in enumerate(clips):
            made = reconstruct(vae, frames)
            before, after = (_unit(x[: len(made)]) for x in (frames, made))
            decibels.append(float(psnr(before, after).mean()))
            likenesses.append(float(ssim(before, after).mean()))
            if index < 3:  # noqa: PLR2004 - enough to see
                shown = choose_frames(len(made), _SHOWN)
                note = f"{source}: {decibels[-1]:.1f} dB, SSIM {likenesses[-1]:.3f}"
                strips += [
                    Strip(frames[shown], (f"{source}: original",)),
                    Strip(made[shown], (note,)),
                ]
        for name, values in (("PSNR in dB", decibels), ("SSIM", likenesses)):
            share = share_of([[value] for value in values])
            numbers[f"{source}: {name}"] = share.value
            numbers[f"{source}: {name}, standard error"] = share.error
    about = {"videos": ", ".join(f"{len(clips)} {source}" for source, clips in videos.items())}
    return Report("The autoencoder", about, numbers=numbers, strips=tuple(strips))


def _unit(frames: Frames) -> Float[Tensor, "t c h w"]:
    return rearrange(frames, "t h w c -> t c h w").float() / 255


@torch.no_grad()
def reconstruct(vae: Vae, frames: Frames) -> UInt8[Tensor, "u h w c"]:
    """Encode and decode a video; frames that do not fill a latent frame are left out at the end."""
    spare = (len(frames) - 1) % vae.config.scale.time
    pixels = to_pixels(frames[: len(frames) - spare])[None].to(next(vae.parameters()).device)
    return to_frames(vae.decode(vae.encode(pixels))[0]).cpu()


def _ceilings(
    prompts: Sequence[Prompt], probe: Probe, atlas: Atlas, vae: Vae | None
) -> dict[str, list[Answer]]:
    """Readings of the prompts' own scenes, painted; each scene is painted once."""
    painted: dict[int, tuple[Reading, ...]] = {}
    for prompt in prompts:
        if prompt.scene.seed not in painted:
            frames = render(prompt.scene, atlas).frames
            videos = (frames,) if vae is None else (frames, reconstruct(vae, frames))
            painted[prompt.scene.seed] = tuple(read(probe, video) for video in videos)
    names = (REAL,) if vae is None else (REAL, RECONSTRUCTED)
    return {
        name: [Answer(prompt, (painted[prompt.scene.seed][index],)) for prompt in prompts]
        for index, name in enumerate(names)
    }


def _distances(sources: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """Fréchet distances in the probe's features from real renders; one reading per prompt, equal counts."""
    if REAL not in sources:
        return {}
    clouds = {
        name: torch.cat([one.readings[0].features for one in given])
        for name, given in sources.items()
    }
    return {
        f"Fréchet distance to real renders: {name} ({len(cloud)} frames)": frechet_distance(
            cloud, clouds[REAL]
        )
        for name, cloud in clouds.items()
        if name != REAL
    }


def _of_ceiling(sources: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """Each share over that of real renders of the same prompts, with a 95 % interval over prompts (bootstrap)."""
    if REAL not in sources:
        return {}
    numbers = {}
    for group in dict.fromkeys(answer.prompt.group for answer in sources[GENERATED]):
        pairs = [
            pair
            for pair in zip(sources[GENERATED], sources[REAL], strict=True)
            if pair[0].prompt.group == group
        ]
        for category, right in JUDGES.items():
            asked = [
                pair
                for pair in pairs
                if right(pair[0].prompt.facts, pair[0].readings[0]) is not None
            ]
            if not asked:
                continue
            hits = [
                [
                    sum(bool(right(one.prompt.facts, said)) for said in one.readings)
                    / len(one.readings)
                    for one in pair
                ]
                for pair in asked
            ]
            value, low, high = ratio_with_interval(torch.tensor(hits))
            name = f"of the ceiling: {group}, {category}"
            numbers |= {name: value, f"{name}, from": low, f"{name}, to": high}
    return numbers


def _said(prompt: Prompt, reading: Reading) -> dict[str, object]:
    said = {
        name: getattr(reading, name)
        for name in ("noun", "place", "time_of_day", "colour", "direction")
    }
    return {
        "prompt": prompt.text,
        "facts": asdict(prompt.facts),
        "read": {**said, "nouns": reading.nouns[:FIRST]},
    }


def _strip(frames: Frames, prompt: Prompt, reading: Reading) -> Strip:
    wrong = [name for name, right in JUDGES.items() if right(prompt.facts, reading) is False]
    words = (
        f"{reading.colour} {reading.noun}",
        reading.place,
        reading.time_of_day,
        reading.direction,
    )
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "all right"
    return Strip(
        frames[choose_frames(len(frames), _SHOWN)],
        (prompt.text, "read: " + " | ".join(words), verdict),
    )
