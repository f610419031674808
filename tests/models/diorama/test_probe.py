"""The probe: any length and size, independent videos, saving and loading."""

from pathlib import Path

import pytest
import torch

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import save_part
from skyloom.models.diorama.probe import (
    BUNDLED,
    Probe,
    ProbeConfig,
    choose_frames,
    load_probe,
    predict,
    prepare,
)

CONFIG = ProbeConfig(
    ("ball", "cube"), ("sea", "sky"), ("day",), ("red",), size=32, widths=(16, 16, 16, 32)
)


@pytest.fixture
def probe() -> Probe:
    torch.manual_seed(0)
    return Probe(CONFIG).eval()


def video(frames: int, height: int, width: int) -> torch.Tensor:
    values = torch.randint(
        0, 256, (frames, height, width, 3), generator=torch.Generator().manual_seed(frames)
    )
    return values.byte()


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 48, 32), (5, 70, 90), (97, 32, 64)])
def test_reads_videos_of_any_length_and_size(probe: Probe, shape: tuple[int, int, int]):
    prediction = predict(probe, video(*shape))
    assert sorted(prediction.nouns) == ["ball", "cube"]
    assert prediction.noun == prediction.nouns[0]
    assert prediction.colour in ("none", "red")
    assert prediction.direction in ("none", "left", "right")
    assert prediction.features.shape == (min(5, shape[0]), CONFIG.features)


def test_a_prediction_does_not_depend_on_its_batch(probe: Probe):
    one, other = prepare(video(9, 32, 32), CONFIG), prepare(video(12, 32, 32), CONFIG)
    with torch.no_grad():
        together, alone = probe(torch.cat([one, other])), probe(one)
    for name, scores in alone.scores.items():
        torch.testing.assert_close(together.scores[name][:1], scores, atol=1e-5, rtol=1e-4)


def test_the_frames_it_looks_at_are_spread_from_first_to_last():
    assert choose_frames(33, 5).tolist() == [0, 8, 16, 24, 32]
    assert choose_frames(2, 5).tolist() == [0, 1]


def test_saving_and_loading_is_exact(probe: Probe, tmp_path: Path):
    save_part(tmp_path, "probe", CONFIG, probe.state_dict())
    loaded = load_probe(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(
        predict(loaded, video(9, 32, 32)).features, predict(probe, video(9, 32, 32)).features
    )


def test_a_missing_probe_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="probe"):
        load_probe(tmp_path)


def test_the_bundled_probe_is_small():
    probe = load_probe()
    assert sum(parameter.numel() for parameter in probe.parameters()) <= 1_700_000
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3.6e6
