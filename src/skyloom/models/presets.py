"""Named sizes of the transformer."""

from skyloom.models.dit import DitConfig


def dit_tiny() -> DitConfig:
    """For tests: two layers, a few thousand weights."""
    return DitConfig(
        in_channels=8,
        out_channels=8,
        width=48,
        heads=4,
        layers=2,
        ffn=96,
        text_width=16,
        pooled_text=True,
    )


def dit_diorama() -> DitConfig:
    """The bundled model: 9.3 M weights, 48-channel latents, angular prediction."""
    return DitConfig(
        in_channels=48,
        out_channels=48,
        width=256,
        heads=4,
        layers=8,
        ffn=1024,
        text_width=384,
        pooled_text=True,
        prediction="angular",
    )


def wan_1_3b() -> DitConfig:
    """Wan 2.1 text to video, 1.3 B (Apache-2.0)."""
    return DitConfig(
        in_channels=16, out_channels=16, width=1536, heads=12, layers=30, ffn=8960, text_width=4096
    )


def wan_14b() -> DitConfig:
    """Wan 2.1 text to video, 14 B (Apache-2.0)."""
    return DitConfig(
        in_channels=16, out_channels=16, width=5120, heads=40, layers=40, ffn=13824, text_width=4096
    )
