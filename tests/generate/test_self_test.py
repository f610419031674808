"""A machine that decodes wrong is found out; one that only rounds is not."""

import pytest
import torch
from torch import nn

from skyloom.generate.self_test import TOLERANCE, compare_decoders
from skyloom.models.registry import BUNDLED, read_model

CPU = torch.device("cpu")


def test_fp32_is_itself(tiny_model):
    assert compare_decoders(read_model(tiny_model), CPU, torch.float32) == 0


def test_a_wrong_convolution_is_seen(tiny_model, monkeypatch):
    real = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d,
        "forward",
        lambda self, x: real(self, x) * (0 if x.dtype == torch.bfloat16 else 1),
    )
    assert compare_decoders(read_model(tiny_model), CPU, torch.bfloat16) > TOLERANCE


@pytest.mark.skipif(not (BUNDLED / "diorama").exists(), reason="no bundled model")
def test_rounding_to_bf16_is_no_fault():
    assert compare_decoders(read_model(BUNDLED / "diorama"), CPU, torch.bfloat16) <= TOLERANCE
