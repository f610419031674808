"""Records of the Wan models and the sizes of their transformer. Needs no torch.

Settings are those of the original code and its README (github.com/Wan-Video).
"""

from dataclasses import dataclass, replace

from skyloom.models.family import ModelFamily, Prediction, Schedule, SizeRule

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Of the original code (wan/configs/shared_config.py): bad quality, deformed, still, cluttered."""

FAMILY = ModelFamily(
    name="wan",
    licence="Apache-2.0",
    sizes=SizeRule(
        multiple=32, min_side=128, max_side=1280, max_area=1280 * 704, default=(1280, 704)
    ),
    fps=24,
    frames=121,
    num_steps=50,
    guidance_scale=5.0,
    schedule=Schedule("unipc", "wan", shift=5.0),
    edit_verbs=(
        "remix",
        "restyle",
        "retake",
        "inpaint",
        "extend",
        "recut",
        "loop",
        "blend",
        "stitch",
    ),
    negative_prompt=NEGATIVE_PROMPT,
    trial_decode=True,
)
"""Wan2.2-TI2V-5B; the other variants differ from it in what `VARIANTS` says."""

_LARGE = replace(
    FAMILY,
    sizes=SizeRule(
        multiple=16, min_side=128, max_side=1280, max_area=1280 * 720, default=(832, 480)
    ),
    fps=16,
    frames=81,
    schedule=Schedule("unipc", "wan", shift=3.0, area_shifts=((1280 * 704, 5.0),)),
    frame_levels=False,
)
VARIANTS = {
    "ti2v-5b": FAMILY,
    "t2v-14b": _LARGE,
    "t2v-1.3b": replace(
        _LARGE,
        sizes=replace(_LARGE.sizes, max_side=832, max_area=832 * 480),
        guidance_scale=6.0,
        schedule=Schedule("unipc", "wan", shift=8.0),
    ),
}


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network.

    text_width: channels of the text encoder. text_length: text tokens that are attended to; shorter
    prompts are padded with zero rows, without a mask. frequency_width: sinusoids of the timestep.
    window: latent frames per window of causal attention.
    """

    in_channels: int
    out_channels: int
    width: int
    heads: int
    layers: int
    ffn: int
    text_width: int
    text_length: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)
    frequency_width: int = 256
    window: int = 3
    rope_theta: float = 10000.0
    eps: float = 1e-6
    prediction: Prediction = "velocity"

    @property
    def head_width(self) -> int:
        """Number of channels of one head."""
        return self.width // self.heads
