"""Whole videos against the pipelines of diffusers, from the same start noise (rows 20, 22 and 26).

Weights are random; the tiny models have all parts of the real ones.
"""

import numpy as np
import pytest
import torch
import wan_models
from PIL import Image

import skyloom
from skyloom.generate.request import Request
from skyloom.media.frames import to_frames
from skyloom.models.wan.config import NEGATIVE_PROMPT

PROMPT = "a red cat runs on the beach"
STEPS = 8
GUIDANCE = 5.0
FRAMES = 9


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Reference parts and the folder of their weights, by variant."""
    root = tmp_path_factory.mktemp("wan")
    return {
        variant: (wan_models.write_parts(root / variant, variant), root / variant)
        for variant in ("ti2v-5b", "t2v-1.3b")
    }


@pytest.fixture
def load(theirs, tmp_path):
    def make(variant: str):
        sizes = {**wan_models.SIZES, "multiple": 16} if variant == "t2v-1.3b" else wan_models.SIZES
        folder = wan_models.write_model(
            tmp_path / variant, theirs[variant][1], variant, sizes=sizes, num_steps=STEPS
        )
        return skyloom.load(str(folder), dtype="float32")

    return make


@torch.no_grad()
def embed(parts, folder, text):
    """Embed a prompt as diffusers does: 512 tokens, the padded ones zero."""
    from skyloom.models.wan.tokenizer import WanTokenizer, clean_prompt

    tokenizer = WanTokenizer.from_sentencepiece((folder / "tokenizer/spiece.model").read_bytes())
    ids = torch.tensor([tokenizer(clean_prompt(text), 512).ids])
    embedded = parts["text_encoder"](ids).last_hidden_state
    return torch.nn.functional.pad(embedded, (0, 0, 0, 512 - embedded.shape[1]))


def reference(parts, folder, noise, *, shift, size, kind, image=None):
    """The frames in [0, 1] and the latent of diffusers' pipeline."""
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=shift,
    )
    common = {"tokenizer": None, "text_encoder": None, "vae": parts["vae"], "scheduler": scheduler}
    if image is None:
        made = diffusers.WanPipeline(
            **common, transformer=parts["transformer"], expand_timesteps=kind == "ti2v-5b"
        )
    else:
        made = diffusers.WanImageToVideoPipeline(
            **common, transformer=parts["transformer"], expand_timesteps=True
        )
    made.set_progress_bar_config(disable=True)
    options = {} if image is None else {"image": image}
    results = [
        made(
            **options,
            prompt_embeds=embed(parts, folder, PROMPT),
            negative_prompt_embeds=embed(parts, folder, NEGATIVE_PROMPT),
            latents=noise[None].clone(),
            height=size[1],
            width=size[0],
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type=output,
        ).frames
        for output in ("latent", "np")
    ]
    return results[0], torch.from_numpy(np.asarray(results[1][0]))


def ours(pipeline, noise, size, **fields):
    request = Request(
        PROMPT,
        size=f"{size[0]}x{size[1]}",
        seconds=(FRAMES - 1) / pipeline.info.fps,
        guidance_scale=GUIDANCE,
        schedule="diffusers",
        **fields,
    )
    steps = list(pipeline.stream(request, noise=noise))
    latents = [step.latent for step in steps if step.phase == "denoise"]
    return latents[-1], steps[-1].video.frames


@pytest.mark.parametrize("variant, size", [("t2v-1.3b", (48, 32)), ("ti2v-5b", (96, 64))])
def test_text_to_video(theirs, load, variant, size):
    parts, folder = theirs[variant]
    pipeline = load(variant)
    space = pipeline.autoencoder.scale.space
    cells = (pipeline.autoencoder.latent_channels, 3, size[1] // space, size[0] // space)
    noise = torch.randn(*cells, generator=torch.Generator().manual_seed(0))
    shift = pipeline.info.schedule.at_size(*size).shift
    expected, frames = reference(parts, folder, noise, shift=shift, size=size, kind=variant)
    check(pipeline, expected, frames, *ours(pipeline, noise, size))


def test_image_to_video(theirs, load, tmp_path):
    size = (96, 64)
    parts, folder = theirs["ti2v-5b"]
    pipeline = load("ti2v-5b")
    noise = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "first.png")
    expected, frames = reference(
        parts, folder, noise, shift=5.0, size=size, kind="ti2v-5b", image=image
    )
    latent, made = ours(pipeline, noise, size, image=str(tmp_path / "first.png"))
    check(pipeline, expected, frames, latent, made)


def check(pipeline, expected, frames, latent, made):
    """Compare latents, and pixels before the watermark, which changes them by a few levels."""
    assert expected.std() > 0.1
    assert float((expected[0] - latent).abs().max()) <= 1e-4
    decoded = to_frames(pipeline.autoencoder.decode(latent[None])[0])
    assert decoded.shape == frames.shape == made.shape
    assert frames.std() > 0.1
    assert (decoded / 255 - frames).abs().max() <= 1.01 / 255
    assert (made / 255 - frames).abs().max() <= 20 / 255
