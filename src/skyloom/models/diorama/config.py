"""The diorama family (small videos of things in places, made on a CPU): record, network sizes."""

from dataclasses import dataclass

from skyloom.core.types import ScaleFactors
from skyloom.models.diorama.words import COLOUR_NAMES, THING_NAMES
from skyloom.models.family import ModelFamily, Prediction, Quality, Schedule, SizeRule

TIME = 4
PATCH = 8

FAMILY = ModelFamily(
    name="diorama",
    licence="Apache-2.0",
    sizes=SizeRule(multiple=32, min_side=64, max_side=256, max_area=256 * 256, default=(256, 256)),
    fps=16,
    frames=33,
    num_steps=20,
    guidance_scale=2.0,
    schedule=Schedule(shift=2.0),
    few_step=Quality(num_steps=4, guidance_scale=1.0, student=True),
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
    knows={"things": tuple(sorted(THING_NAMES)), "colours": COLOUR_NAMES},
)


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the encoder.

    max_tokens: includes the start and end tokens.
    lexical: append each token's own word vector to its hidden state. The layers bring synonyms
        together, but also opposites such as left and right (docs/log.md).
    meaning: width of the prompt attributes (models/diorama/prompt_attributes.py) appended to the
        pooled vector; 0 for none.
    """

    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    ffn: int = 1536
    positions: int = 512
    max_tokens: int = 64
    eps: float = 1e-12
    lexical: bool = False
    meaning: int = 0

    @property
    def pooled_width(self) -> int:
        """Number of channels of a pooled vector."""
        return self.context_width + self.meaning

    @property
    def context_width(self) -> int:
        """Number of channels of a context."""
        return self.width * (2 if self.lexical else 1)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder.

    channels: of the latent.
    widths, blocks: decoder channels and blocks at 1/4 and 1/2 of the encoder's resolution.
    enlarge: pixels per side of the video for one pixel at the encoder's resolution.
    """

    channels: int = 48
    widths: tuple[int, int] = (96, 48)
    blocks: tuple[int, int] = (3, 2)
    enlarge: int = 2

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        return ScaleFactors(time=TIME, space=PATCH * self.enlarge)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network.

    channels: of the latent.
    widths: channels of the fine and the coarse level.
    blocks: residual blocks at the fine level before and after the coarse level, and at the coarse
        level before and after the attention.
    grid: latent height and width for which the position map is stored; other sizes interpolate it.
    window: latent frames per window of causal attention.
    horizon: frame indices from this one on share one embedding.
    """

    channels: int = 48
    widths: tuple[int, int] = (128, 192)
    blocks: tuple[int, int, int, int] = (3, 3, 2, 2)
    attentions: int = 2
    heads: int = 4
    embedding: int = 256
    frequencies: int = 128
    text_width: int = 768
    pooled_width: int = 1024
    grid: int = 16
    window: int = 3
    horizon: int = 9
    rope_theta: float = 10000.0
    prediction: Prediction = "angular"
