"""Evaluations on built-in shapes: a perfect generator reaches its ceiling exactly."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from diorama.evaluate.adherence import SHUFFLED
from diorama.evaluate.prompts import Prompt, commonest_nouns, prompts_for
from diorama.evaluate.suite import (
    GENERATED,
    REAL,
    RECONSTRUCTED,
    evaluate_adherence,
    evaluate_autoencoder,
    evaluate_ceiling,
    reconstruct,
)
from diorama.world.assets import builtin_atlas
from diorama.world.render import render
from diorama.world.vocabulary import TINY
from skyloom.core.types import VideoShape
from skyloom.models.diorama.probe import Probe, ProbeConfig
from skyloom.models.diorama.v1.autoencoder import Vae, VaeConfig

ATLAS = builtin_atlas()
SHAPE = VideoShape(5, 32, 32)


@dataclass
class Video:
    frames: torch.Tensor


class Painter:
    """Renders the scene of a prompt."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.scenes = {prompt.text: prompt.scene for prompt in prompts}

    def generate(self, request: str, /, *, seed: int) -> Video:
        return Video(render(self.scenes[request], ATLAS).frames)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return prompts_for(TINY, 6, shape=SHAPE, nouns=ATLAS.nouns)


@pytest.fixture(scope="module")
def probe() -> Probe:
    torch.manual_seed(1)
    config = ProbeConfig(
        TINY.nouns, TINY.places, TINY.times, TINY.colours, size=32, widths=(16, 16, 16, 32)
    )
    return Probe(config).eval()


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(2)
    return Vae(VaeConfig(latent_channels=4, decoder_widths=(8, 8, 8, 8))).eval()


def test_a_perfect_generator_reaches_its_ceiling_exactly(
    prompts: list[Prompt], probe: Probe, vae: Vae, tmp_path: Path
):
    progress: list[tuple[int, int]] = []
    commonest = commonest_nouns(TINY, 300, ATLAS.nouns)
    report = evaluate_adherence(
        Painter(prompts),
        prompts,
        (1, 2),
        probe,
        atlas=ATLAS,
        vae=vae,
        commonest=commonest,
        on_video=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(done, 12) for done in range(1, 13)]
    group = prompts[0].group
    for category in ("noun", "place", "direction", "no direction"):
        made, real = (report.share(group, category, source) for source in (GENERATED, REAL))
        assert (made.value, made.cases) == (real.value, real.cases)
    assert report.share(group, "noun", SHUFFLED).cases == 6
    assert report.share(group, "noun", RECONSTRUCTED).cases == 6
    distances = {
        name.split(": ")[1].split(" (")[0]: value for name, value in report.numbers.items()
    }
    assert distances[GENERATED] == pytest.approx(0, abs=1e-6)
    check_files(report.save(tmp_path))


def check_files(paths: list[Path]) -> None:
    markdown, data, sheet = paths
    assert "| noun |" in markdown.read_text()
    table = json.loads(data.read_text())
    assert len(table["cases"]) == 12
    assert {"prompt", "facts", "read", "seed", "group"} <= set(table["cases"][0])
    with Image.open(sheet) as picture:
        assert picture.width >= 2 * 5 * 32


def test_without_an_atlas_there_are_no_ceilings(prompts: list[Prompt], probe: Probe):
    report = evaluate_adherence(Painter(prompts), prompts[:2], (1,), probe)
    assert {row.source for row in report.rows} >= {GENERATED, SHUFFLED}
    assert REAL not in {row.source for row in report.rows}
    assert report.numbers == {}


def test_the_ceiling_reads_each_scene_and_its_reconstruction(
    prompts: list[Prompt], probe: Probe, vae: Vae
):
    report = evaluate_ceiling(prompts, probe, ATLAS, vae)
    assert {row.source for row in report.rows} == {REAL, RECONSTRUCTED, SHUFFLED}
    assert len(report.cases) == 2 * len(prompts)


def test_reconstruction_leaves_out_frames_that_fill_no_latent_frame(vae: Vae):
    frames = torch.zeros(7, 32, 32, 3, dtype=torch.uint8)
    assert reconstruct(vae, frames).shape == (5, 32, 32, 3)


def test_the_autoencoder_report_names_every_source(vae: Vae, prompts: list[Prompt], tmp_path: Path):
    clips = [render(prompt.scene, ATLAS).frames for prompt in prompts[:2]]
    report = evaluate_autoencoder(vae, {"renders": clips, "other": clips[:1]})
    assert report.numbers["renders: PSNR in dB"] > 0
    assert report.numbers["other: SSIM"] == report.numbers["other: SSIM"]
    saved = json.loads(report.save(tmp_path)[1].read_text())
    assert saved["numbers"]["other: SSIM, standard error"] is None
