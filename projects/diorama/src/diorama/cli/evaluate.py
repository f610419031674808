"""`diorama evaluate`: measure the model and write reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.evaluate.report import Report
    from skyloom.generate.pipeline import Pipeline
    from skyloom.media.video import Video

app = typer.Typer(help="Measure the model, its autoencoder and the probe.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder for report.md, report.json and sheet.png.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
AtlasFolder = Annotated[Path, typer.Option(help="Folder made by `diorama world assets`.")]
Quality = Annotated[str | None, typer.Option(help="fast or best (default: the model's own)")]
Model = Annotated[str, typer.Option(help="Name of a model, or its folder.")]
_WINDOWS_SEED = 3  # scenes that no other evaluation uses


@app.command()
def adherence(
    count: Annotated[
        int, typer.Option(help="Prompts of seen pairs, and as many of held-out pairs.")
    ] = 50,
    seeds: Annotated[int, typer.Option(help="Videos per prompt.")] = 1,
    synonyms: Annotated[
        int, typer.Option(help="Scenes, each with a seen noun and with an unseen synonym.")
    ] = 0,
    pairs: Annotated[int, typer.Option(help="Scenes with two subjects.")] = 0,
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    quality: Quality = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps (default: the model's own)")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance (default: the model's own)")
    ] = None,
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Measure prompt adherence with a probe trained on renders alone."""
    from diorama.evaluate.prompts import (
        commonest_nouns,
        prompts_for,
        synonym_prompts,
        two_object_prompts,
    )
    from diorama.evaluate.suite import evaluate_adherence
    from diorama.world.assets import load_atlas
    from diorama.world.vocabulary import DIORAMA, SMALL
    from skyloom.generate.pipeline import load
    from skyloom.models.diorama.probe import load_probe

    pipeline = load(model)
    sprites = load_atlas(atlas)
    prompts = prompts_for(SMALL, count) + prompts_for(SMALL, count, held_out=True)
    prompts += synonym_prompts(SMALL, synonyms) if synonyms else []
    prompts += two_object_prompts(DIORAMA, pairs) if pairs else []
    report = evaluate_adherence(
        _Configured(pipeline, num_steps=steps, guidance_scale=guidance, quality=quality),
        prompts,
        range(seeds),
        load_probe(),
        atlas=sprites,
        vae=pipeline.autoencoder,
        commonest=commonest_nouns(SMALL),
        on_video=lambda done, total: typer.echo(f"\r{done} of {total} videos", nl=False, err=True),
    )
    _finish(report, out, as_json)


class _Configured:
    """Pipeline with some request fields fixed."""

    def __init__(self, pipeline: "Pipeline", **fields: object) -> None:
        self.pipeline = pipeline
        self.fields = fields

    def generate(self, request: str, /, *, seed: int) -> "Video":
        """Generate one video of a prompt."""
        return self.pipeline.generate(request, seed=seed, **self.fields)


@app.command()
def motion(
    count: Annotated[int, typer.Option(help="Prompts.")] = 24,
    seconds: Annotated[float, typer.Option(help="Length of every video.")] = 5.0,
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    quality: Quality = None,
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Compare speed, flicker and drift with real renders of the same scenes."""
    from diorama.evaluate.compare import compare_motion
    from diorama.evaluate.prompts import prompts_for
    from diorama.world.assets import load_atlas
    from diorama.world.vocabulary import SMALL
    from skyloom.generate.pipeline import load

    pipeline = load(model)
    configured = _Configured(pipeline, quality=quality, seconds=seconds)
    frames = pipeline.autoencoder.scale.frames_for(seconds, pipeline.info.fps)
    report = compare_motion(
        configured, prompts_for(SMALL, count, seed=2), load_atlas(atlas), frames
    )
    _finish(report, out, as_json)


@app.command()
def drift(
    count: Annotated[int, typer.Option(help="Prompts.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of every video.")] = 60.0,
    part: Annotated[float, typer.Option(help="Seconds per segment.")] = 5.0,
    sink: Annotated[
        int | None, typer.Option(help="First latent frames in the cache (default: the model's)")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(help="Last latent frames in the cache (default: the model's)")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Latent frames per window (default: the model's)")
    ] = None,
    context_sigma: Annotated[
        float | None, typer.Option(help="Noise level of cached frames (default: the model's)")
    ] = None,
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    quality: Quality = None,
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Compare later segments of long videos with their first one."""
    from dataclasses import asdict, replace

    from diorama.evaluate.compare import compare_drift
    from diorama.evaluate.prompts import prompts_for
    from diorama.world.assets import load_atlas
    from diorama.world.vocabulary import SMALL
    from skyloom.core.errors import RequestError
    from skyloom.generate.pipeline import load
    from skyloom.models.diorama.probe import load_probe

    pipeline = load(model)
    if pipeline.info.rollout is None:
        raise RequestError(
            f"Model {model!r} does not support videos longer than its window.",
            hint="Choose another model.",
        )
    options = {"sink": sink, "recent": recent, "window": window, "context_sigma": context_sigma}
    changed = {name: value for name, value in options.items() if value is not None}
    rollout = replace(pipeline.info.rollout, **changed)
    manifest = {**pipeline.info.manifest, "rollout": asdict(rollout)}
    pipeline.info = replace(pipeline.info, manifest=manifest)
    report = compare_drift(
        _Configured(pipeline, seconds=seconds, quality=quality),
        prompts_for(SMALL, count),
        load_probe(),
        load_atlas(atlas),
        part=round(part * pipeline.info.fps),
        seams=_seams(pipeline, seconds),
        on_video=_progress(count),
    )
    _finish(report, out, as_json)


@app.command()
def windows(
    count: Annotated[int, typer.Option(help="Prompts.")] = 10,
    seconds: Annotated[float, typer.Option(help="Length of every video.")] = 14.0,
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    quality: Quality = None,
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Measure windows of generated and rendered videos with the critic of `--retake`."""
    from diorama.evaluate.compare import compare_windows
    from diorama.evaluate.prompts import prompts_for
    from diorama.world.assets import load_atlas
    from diorama.world.vocabulary import DIORAMA
    from skyloom.core.errors import RequestError
    from skyloom.evaluate.window_quality import load_critic
    from skyloom.generate.pipeline import load

    pipeline = load(model)
    seams = _seams(pipeline, seconds)
    if not seams:
        raise RequestError(
            f"--seconds must be more than one window of {model}, got {seconds:g}.",
            hint="Use a larger value.",
        )
    report = compare_windows(
        _Configured(pipeline, seconds=seconds, quality=quality),
        prompts_for(DIORAMA, count, seed=_WINDOWS_SEED),
        load_critic(pipeline.info),
        load_atlas(atlas),
        seams,
        on_video=_progress(count),
    )
    _finish(report, out, as_json)


def _seams(pipeline: "Pipeline", seconds: float) -> list[int]:
    """Return the first frames of all windows but the first one."""
    from skyloom.generate.request import Request

    windows = pipeline.plan(Request("a", seconds=seconds)).windows
    return [pipeline.autoencoder.scale.video_frames(one.start) for one in windows[1:]]


def _progress(count: int) -> Callable[[int], None]:
    """Return a callback that prints the number of finished videos."""
    return lambda done: typer.echo(f"\r{done + 1} of {count} videos", nl=False, err=True)


@app.command()
def ceiling(
    count: Annotated[
        int, typer.Option(help="Scenes of seen pairs, and as many of held-out pairs.")
    ] = 200,
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Measure the probe on real renders, the upper bound of prompt adherence."""
    from diorama.evaluate.prompts import prompts_for
    from diorama.evaluate.suite import evaluate_ceiling
    from diorama.world.assets import load_atlas
    from diorama.world.vocabulary import SMALL
    from skyloom.generate.pipeline import load
    from skyloom.models.diorama.probe import load_probe

    prompts = prompts_for(SMALL, count) + prompts_for(SMALL, count, held_out=True)
    report = evaluate_ceiling(prompts, load_probe(), load_atlas(atlas), load(model).autoencoder)
    _finish(report, out, as_json)


@app.command()
def autoencoder(
    count: Annotated[int, typer.Option(help="Held-out renders.")] = 24,
    clips: Annotated[
        list[Path] | None, typer.Option(help="Real videos to reconstruct as well.")
    ] = None,
    size: Annotated[str, typer.Option(help="Crop real videos to this size.")] = "256x256",
    out: Out = Path("evaluation"),
    model: Model = "diorama",
    atlas: AtlasFolder = Path(".atlas"),
    as_json: AsJson = False,
) -> None:
    """Measure PSNR and SSIM of the autoencoder on held-out renders and real videos."""
    from diorama.evaluate.prompts import prompts_for
    from diorama.evaluate.suite import evaluate_autoencoder
    from diorama.world.assets import load_atlas
    from diorama.world.render import render
    from diorama.world.vocabulary import SMALL
    from skyloom.generate.pipeline import load
    from skyloom.generate.request import parse_size
    from skyloom.media.source import open_source

    sprites = load_atlas(atlas)
    renders = [render(prompt.scene, sprites).frames for prompt in prompts_for(SMALL, count, seed=1)]
    width, height = parse_size(size)
    videos = {"held-out renders": renders}
    for path in clips or []:
        source = open_source(path, size=(height, width))
        videos[path.name] = [source.read(0, min(33, source.frames))]
    _finish(evaluate_autoencoder(load(model).autoencoder, videos), out, as_json)


def _finish(report: "Report", out: Path, as_json: bool) -> None:
    paths = report.save(out)
    typer.echo(json.dumps(report.as_table()) if as_json else report.as_markdown())
    typer.echo(f"written: {', '.join(map(str, paths))}", err=True)
