"""Evaluations: prompt adherence, its ceiling, and reconstruction by the autoencoder.

Every accuracy is reported with its ceiling (real renders of the same scenes, also reconstructed by
the autoencoder, classified by the same probe) and its chance baselines (the same predictions
compared with other prompts; a guess from the place alone). Standard errors count a prompt once,
whatever the number of seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from diorama.evaluate.adherence import (
    CHECKS,
    SHUFFLED,
    TOP_K,
    Check,
    PromptResult,
    accuracies,
    chance_baselines,
)
from diorama.evaluate.prompts import Prompt
from diorama.world.assets import Atlas
from diorama.world.render import render
from skyloom.evaluate.metrics import frechet_distance, psnr, ratio_with_interval, share_of, ssim
from skyloom.evaluate.report import Report, Strip
from skyloom.media.frames import to_frames, to_pixels
from skyloom.models.base import Autoencoder
from skyloom.models.diorama.probe import Probe, ProbePrediction, choose_frames, predict

# sources of videos
GENERATED = "generated"
REAL = "real renders"
RECONSTRUCTED = "renders through the autoencoder"
_SHOWN = 5  # frames per strip
_MAX_STRIPS = 60

Frames = UInt8[Tensor, "t h w c"]


@runtime_checkable
class VideoGenerator(Protocol):
    """The evaluated object: a pipeline, or anything that generates a video from a prompt."""

    def generate(self, request: str, /, *, seed: int) -> "GeneratedVideo": ...


@runtime_checkable
class GeneratedVideo(Protocol):
    """A video with at least its frames."""

    @property
    def frames(self) -> Frames: ...


def evaluate_adherence(
    pipeline: VideoGenerator,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    probe: Probe,
    *,
    atlas: Atlas | None = None,
    vae: Autoencoder | None = None,
    commonest: Mapping[str, str] | None = None,
    on_video: Callable[[int, int], None] | None = None,
) -> Report:
    """Generate every prompt with every seed and classify the videos.

    atlas: renders the ceilings. commonest: most frequent noun per place, for the chance baseline.
    on_video: progress callback (done, total).
    """
    results: list[PromptResult] = []
    strips: list[Strip] = []
    cases: list[dict[str, object]] = []
    for number, prompt in enumerate(prompts):
        predictions: list[ProbePrediction] = []
        for turn, seed in enumerate(seeds):
            frames = pipeline.generate(prompt.text, seed=seed).frames
            predicted = predict(probe, frames)
            predictions.append(predicted)
            cases.append({"seed": seed, "group": prompt.group, **_case(prompt, predicted)})
            if turn == 0 and len(strips) < _MAX_STRIPS:
                strips.append(_strip(frames, prompt, predicted))
            if on_video:
                on_video(number * len(seeds) + turn + 1, len(prompts) * len(seeds))
        results.append(PromptResult(prompt, tuple(predictions)))
    sources = {GENERATED: results}
    if atlas is not None:
        sources.update(_ceilings(prompts, probe, atlas, vae))
    rows = [row for source, found in sources.items() for row in accuracies(found, source)]
    rows += chance_baselines(results, commonest or {})
    about = {
        "prompts": len(prompts),
        "seeds": len(seeds),
        "probe": "trained on rendered clips only",
    }
    numbers = {**_relative_to_ceiling(sources), **_distances(sources)}
    return Report(
        "Prompt adherence",
        about,
        rows=tuple(rows),
        numbers=numbers,
        cases=tuple(cases),
        strips=tuple(strips),
    )


def evaluate_ceiling(
    prompts: Sequence[Prompt], probe: Probe, atlas: Atlas, vae: Autoencoder | None = None
) -> Report:
    """Classify real renders of the prompts' scenes, and their reconstructions."""
    sources = _ceilings(prompts, probe, atlas, vae)
    rows = [row for source, found in sources.items() for row in accuracies(found, source)]
    rows += [row for row in chance_baselines(sources[REAL], {}) if row.source == SHUFFLED]
    cases = tuple(
        {
            "source": source,
            "group": result.prompt.group,
            **_case(result.prompt, result.predictions[0]),
        }
        for source, found in sources.items()
        for result in found
    )
    about = {"scenes": len(prompts)}
    numbers = _distances(sources)
    return Report("What the probe can read", about, tuple(rows), numbers, cases)


def evaluate_autoencoder(vae: Autoencoder, videos: Mapping[str, Sequence[Frames]]) -> Report:
    """Measure PSNR and SSIM of reconstructed videos per source."""
    numbers: dict[str, float] = {}
    strips: list[Strip] = []
    for source, clips in videos.items():
        decibels: list[float] = []
        similarities: list[float] = []
        for index, frames in enumerate(clips):
            made = reconstruct(vae, frames)
            before, after = (_unit(x[: len(made)]) for x in (frames, made))
            decibels.append(float(psnr(before, after).mean()))
            similarities.append(float(ssim(before, after).mean()))
            if index < 3:  # noqa: PLR2004 - strips per source
                shown = choose_frames(len(made), _SHOWN)
                note = f"{source}: {decibels[-1]:.1f} dB, SSIM {similarities[-1]:.3f}"
                strips.append(Strip(frames[shown], (f"{source}: original",)))
                strips.append(Strip(made[shown], (note,)))
        for name, values in (("PSNR in dB", decibels), ("SSIM", similarities)):
            share = share_of([[value] for value in values])
            numbers[f"{source}: {name}"] = share.value
            numbers[f"{source}: {name}, standard error"] = share.error
    about = {"videos": ", ".join(f"{len(clips)} {source}" for source, clips in videos.items())}
    return Report("The autoencoder", about, numbers=numbers, strips=tuple(strips))


def _unit(frames: Frames) -> Float[Tensor, "t c h w"]:
    return rearrange(frames, "t h w c -> t c h w").float() / 255


@torch.no_grad()
def reconstruct(vae: Autoencoder, frames: Frames) -> UInt8[Tensor, "u h w c"]:
    """Encode and decode a video; last frames that do not fill a latent frame are dropped."""
    spare = (len(frames) - 1) % vae.scale.time
    pixels = to_pixels(frames[: len(frames) - spare])[None].to(vae.device)
    return to_frames(vae.decode(vae.encode(pixels))[0]).cpu()


def _ceilings(
    prompts: Sequence[Prompt], probe: Probe, atlas: Atlas, vae: Autoencoder | None
) -> dict[str, list[PromptResult]]:
    """Classify renders of the prompts' scenes; each scene is rendered once."""
    by_seed: dict[int, tuple[ProbePrediction, ...]] = {}
    for prompt in prompts:
        if prompt.scene.seed not in by_seed:
            frames = render(prompt.scene, atlas).frames
            videos = (frames,) if vae is None else (frames, reconstruct(vae, frames))
            by_seed[prompt.scene.seed] = tuple(predict(probe, video) for video in videos)
    names = (REAL,) if vae is None else (REAL, RECONSTRUCTED)
    return {
        name: [PromptResult(prompt, (by_seed[prompt.scene.seed][index],)) for prompt in prompts]
        for index, name in enumerate(names)
    }


def _distances(sources: Mapping[str, Sequence[PromptResult]]) -> dict[str, float]:
    """Fréchet distances of probe features to real renders; one prediction per prompt."""
    if REAL not in sources:
        return {}
    features = {
        name: torch.cat([one.predictions[0].features for one in results])
        for name, results in sources.items()
    }
    return {
        f"Fréchet distance to real renders: {name} ({len(each)} frames)": frechet_distance(
            each, features[REAL]
        )
        for name, each in features.items()
        if name != REAL
    }


def _relative_to_ceiling(sources: Mapping[str, Sequence[PromptResult]]) -> dict[str, float]:
    """Accuracies relative to real renders of the same prompts, with 95 % bootstrap intervals."""
    if REAL not in sources:
        return {}
    numbers: dict[str, float] = {}
    groups = dict.fromkeys(result.prompt.group for result in sources[GENERATED])
    for group in groups:
        pairs = [
            pair
            for pair in zip(sources[GENERATED], sources[REAL], strict=True)
            if pair[0].prompt.group == group
        ]
        for category, check in CHECKS.items():
            specified = [
                pair
                for pair in pairs
                if check(pair[0].prompt.facts, pair[0].predictions[0]) is not None
            ]
            if not specified:
                continue
            hits = [[_accuracy(one, check) for one in pair] for pair in specified]
            value, low, high = ratio_with_interval(torch.tensor(hits))
            name = f"of the ceiling: {group}, {category}"
            numbers[name] = value
            numbers[f"{name}, from"] = low
            numbers[f"{name}, to"] = high
    return numbers


def _accuracy(result: PromptResult, check: Check) -> float:
    hits = sum(bool(check(result.prompt.facts, each)) for each in result.predictions)
    return hits / len(result.predictions)


def _case(prompt: Prompt, predicted: ProbePrediction) -> dict[str, object]:
    return {
        "prompt": prompt.text,
        "facts": asdict(prompt.facts),
        "read": {
            "noun": predicted.noun,
            "place": predicted.place,
            "time_of_day": predicted.time_of_day,
            "colour": predicted.colour,
            "direction": predicted.direction,
            "nouns": predicted.nouns[:TOP_K],
        },
    }


def _strip(frames: Frames, prompt: Prompt, predicted: ProbePrediction) -> Strip:
    wrong = [name for name, check in CHECKS.items() if check(prompt.facts, predicted) is False]
    labels = (
        f"{predicted.colour} {predicted.noun}",
        predicted.place,
        predicted.time_of_day,
        predicted.direction,
    )
    result = f"wrong: {', '.join(wrong)}" if wrong else "all right"
    lines = (prompt.text, "read: " + " | ".join(labels), result)
    return Strip(frames[choose_frames(len(frames), _SHOWN)], lines)
