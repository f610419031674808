"""The pipeline from Python: its parts, start noise and signed files."""

import pytest
import torch

import skyloom
from skyloom.core.errors import MediaError, RequestError
from skyloom.core.seeds import noise as draw_noise
from skyloom.generate.receipt import read_receipt
from skyloom.generate.request import Request
from skyloom.safety.verify import check

ASK = Request("a red cat on the beach", seed=7, seconds=1)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32")


def test_the_parts_of_a_pipeline_can_be_called(pipeline):
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    latent = pipeline.autoencoder.encode(video)
    assert latent.shape == (1, pipeline.autoencoder.latent_channels, 3, 2, 2)
    whole = pipeline.autoencoder.decode(latent)
    assert whole.shape == video.shape
    first, cache = pipeline.autoencoder.decode_step(latent[:, :, :1], None)
    rest, _ = pipeline.autoencoder.decode_step(latent[:, :, 1:], cache)
    assert torch.allclose(torch.cat([first, rest], dim=2), whole, atol=1e-5)
    context = pipeline.text_encoder.encode(["a cat"])
    text = pipeline.transformer.prepare_text(context.context, context.context_mask, context.pooled)
    direction = pipeline.transformer(latent, torch.full((1, 3), 0.5), text)
    assert direction.shape == latent.shape


def test_the_start_noise_can_be_given(pipeline):
    plan = pipeline.plan(ASK)
    latent = pipeline.autoencoder.scale.latent_shape(plan.shape)
    shape = (pipeline.autoencoder.latent_channels, latent.frames, latent.height, latent.width)
    own = draw_noise(7, (1, *shape), "window", 0)[0]
    seeded = pipeline.generate(ASK)
    given = pipeline.generate(ASK, noise=own)
    assert len(plan.windows) == 1
    # the receipts differ, and with them the watermark of larger videos
    assert torch.equal(given.frames, seeded.frames)
    assert given.receipt["notes"]["noise"] != seeded.receipt["notes"].get("noise")
    assert not torch.equal(pipeline.generate(ASK, noise=own + 1).frames, seeded.frames)


def test_start_noise_of_another_shape_is_refused(pipeline):
    with pytest.raises(RequestError, match=r"noise must have shape \(\d+, 5, 2, 2\).*got \(1, 2\)"):
        pipeline.stream(ASK, noise=torch.zeros(1, 2))


def test_an_export_is_signed_and_registered_and_holds_the_same_frames(pipeline, tmp_path):
    path = tmp_path / "cat.mp4"
    receipt = pipeline.export(ASK, path)
    assert receipt["frames"] == pipeline.generate(ASK).receipt["frames"]
    assert read_receipt(path).to_dict() == receipt
    findings = check(path)
    assert findings.credentials is not None
    assert findings.matches


def test_an_export_is_refused_before_any_work(pipeline, tmp_path):
    with pytest.raises(MediaError):
        pipeline.export(ASK, tmp_path / "missing" / "cat.mp4")
    with pytest.raises(RequestError, match="must end in"):
        pipeline.export(ASK, tmp_path / "cat.txt")
