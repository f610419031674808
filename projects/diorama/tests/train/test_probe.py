"""Training the probe: labels follow mirrors and reversals, a tiny probe learns directions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diorama.train.probe import (
    ProbeLoader,
    ProbeRun,
    augment,
    label_indices,
    measure_probe,
    probe_task,
)
from skyloom.core.errors import ConfigError
from skyloom.models.diorama.probe import DIRECTIONS, ProbeConfig
from skyloom.train.loop import LoopConfig, train
from skyloom.train.optim import OptimizerConfig
from skyloom.train.run_log import RunLog

FACTS = {"noun": "ball", "place": "sky", "time_of_day": "day", "colour": None}
CONFIG = ProbeConfig(("ball", "cube"), ("sky", "sea"), ("day",), ("red",), size=32)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Shards of clips of a square that goes left, goes right or stands."""
    frames = np.full((12, 9, 32, 32, 3), 60, dtype=np.uint8)
    rows = []
    for clip in range(12):
        direction = (None, "left", "right")[clip % 3]
        for frame in range(9):
            across = {None: 12, "left": 22 - 2 * frame, "right": 2 + 2 * frame}[direction]
            frames[clip, frame, clip : clip + 9, across : across + 8] = (250, 220, 20)
        rows.append({"facts": {**FACTS, "direction": direction}})
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "clips-00000.npy", frames)
    (tmp_path / "clips" / "clips-00000.json").write_text(json.dumps(rows))
    return str(tmp_path / "clips")


def centre(video: torch.Tensor) -> torch.Tensor:
    """The column of the bright square's middle in each frame of a [3 t h w] video."""
    weight = (video[0] - video[0].amin()).clamp(min=0) ** 2
    columns = torch.arange(weight.shape[-1]).float()
    return (weight.sum(1) * columns).sum(-1) / weight.sum((1, 2))


def test_unknown_facts_have_no_label():
    found = label_indices(CONFIG, {**FACTS, "time_of_day": None, "direction": "right"})
    assert found == {"noun": 0, "place": 0, "time_of_day": -100, "colour": 0, "direction": 2}


def test_the_direction_is_where_the_square_goes_after_mirrors_and_reversals(folder: str):
    loader = ProbeLoader(
        ProbeRun(stills=(folder,), clips=(folder,), still_batch=1, clip_batch=40), CONFIG, seed=1
    )
    batch = loader(0)
    assert set(batch.clip_labels["direction"].tolist()) == {0, 1, 2}
    for video, answer in zip(batch.clips, batch.clip_labels["direction"].tolist(), strict=True):
        moved = float(centre(video)[-1] - centre(video)[0])
        assert np.sign(round(moved / 3)) == {"none": 0, "left": -1, "right": 1}[DIRECTIONS[answer]]


def test_the_batch_of_a_step_is_always_the_same(folder: str):
    run = ProbeRun(stills=(folder,), clips=(folder,), still_batch=2, clip_batch=2)
    first, second = ProbeLoader(run, CONFIG, seed=1)(5), ProbeLoader(run, CONFIG, seed=1)(5)
    assert torch.equal(first.clips, second.clips)
    assert not torch.equal(first.clips, ProbeLoader(run, CONFIG, seed=1)(6).clips)


def test_augmentation_keeps_the_range_and_sets_the_size():
    frames = torch.full((3, 40, 40, 3), 255, dtype=torch.uint8)
    video = augment(frames, 32, np.random.default_rng(0))
    assert video.shape == (3, 3, 32, 32)
    assert -1 <= float(video.min()) <= float(video.max()) <= 1


def test_no_clips_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="No rendered clips"):
        ProbeLoader(ProbeRun(stills=(str(tmp_path),), clips=()), CONFIG, seed=1)


def test_a_short_run_learns_and_exports_what_can_be_measured(folder: str, tmp_path: Path):
    run = ProbeRun(
        "tiny", (folder,), (folder,), folder, 2, 8, size=16, widths=(16, 16, 16, 16), measured=12
    )
    loop = LoopConfig(
        steps=20, ema_decay=0.8, log_every=1, save_every=20, evaluate_every=20, seed=2
    )
    task = probe_task(run, loop)
    train(task, loop, OptimizerConfig(lr=3e-3, warmup=2), tmp_path / "run", resume=False)
    losses = [line["loss"] for line in RunLog(tmp_path / "run").lines("step")]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert measure_probe(task.module.eval(), Path(folder), 12)["place"] == 1
    assert (tmp_path / "run" / "probe.safetensors").exists()
