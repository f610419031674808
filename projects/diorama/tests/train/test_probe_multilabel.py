"""The multi-label head: it learns two nouns and leaves other outputs unchanged."""

import json

import numpy as np
import torch

from diorama.train.probe import frozen_features, train_head
from skyloom.models.diorama.probe import Probe, ProbeConfig, predict

COLOURS = {"cat": (250, 30, 30), "dog": (30, 30, 250), "car": (30, 250, 30)}
CONFIG = ProbeConfig(
    tuple(COLOURS), ("beach",), ("day",), ("red",), size=32, widths=(16, 16, 16, 32)
)


def still(nouns):
    """A gray picture with a square of its colour for each noun."""
    frame = np.full((1, 32, 32, 3), 120, np.uint8)
    for index, noun in enumerate(nouns):
        frame[0, 8:20, 2 + 16 * index : 14 + 16 * index] = COLOURS[noun]
    return frame


def test_it_names_both_nouns_and_other_outputs_are_equal(tmp_path):
    torch.manual_seed(0)
    probe = Probe(CONFIG).eval()
    pairs = [("cat",), ("dog",), ("car",), ("cat", "dog"), ("dog", "car"), ("car", "cat")] * 12
    np.save(tmp_path / "clips-00000.npy", np.stack([still(pair) for pair in pairs]))
    rows = [{"facts": {"nouns": pair}} for pair in pairs]
    (tmp_path / "clips-00000.json").write_text(json.dumps(rows))
    maps, targets = frozen_features(probe, [tmp_path], seed=0)
    assert targets.sum(1).tolist() == [float(len(pair)) for pair in pairs]
    trained = train_head(probe, maps, targets, epochs=60)
    right = 0
    for pair in pairs[3:6]:
        frames = torch.from_numpy(still(pair))
        before, after = predict(probe, frames), predict(trained, frames)
        assert (before.noun, before.place, before.nouns) == (after.noun, after.place, after.nouns)
        assert torch.equal(before.features, after.features)
        assert before.things == ()
        right += set(after.things[:2]) == set(pair)
    assert right == 3
