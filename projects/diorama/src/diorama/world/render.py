"""Render a scene: sky, backdrop, ground, sprites from far to near, weather, style.

Every pixel depends only on the scene and the time, so a still equals the clip's frame at that time.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diorama.world.assets import Atlas
from diorama.world.camera import View, cast_rays, rows_and_columns, view_at
from diorama.world.ground import MOVING_GROUNDS, paint_ground
from diorama.world.light import light_of
from diorama.world.motion import Curve
from diorama.world.noise import mix
from diorama.world.places import PLACES
from diorama.world.scene import Scene
from diorama.world.sky import colour, paint_backdrop, paint_sky
from diorama.world.sprites import PlacedSprite, draw_sprite, place_prop, place_subject
from diorama.world.style import apply_style
from diorama.world.weather import fall, fog

BLOCK = 16  # frames rendered per batch; small enough to stay in the processor's cache


@dataclass(frozen=True)
class Rendering:
    """Frames, with the mask and bounding box (x0 y0 x1 y1; zeros if invisible) of each subject."""

    frames: UInt8[Tensor, "t h w c"]
    masks: Bool[Tensor, "o t h w"]
    tracks: Float[Tensor, "o t 4"]


def render(
    scene: Scene, atlas: Atlas, device: str | torch.device = "cpu", times: Curve | None = None
) -> Rendering:
    """Render a scene at its frame times, or at other `times` (seconds) within it."""
    moments = scene.times if times is None else np.asarray(times, dtype=np.float64)
    painter = _Painter(scene, atlas, torch.device(device))
    with torch.no_grad():
        parts = [
            painter.paint(moments[start : start + BLOCK]) for start in range(0, len(moments), BLOCK)
        ]
    masks = torch.cat([part[1] for part in parts], 1)
    return Rendering(torch.cat([part[0] for part in parts]), masks, boxes_of(masks))


class _Painter:
    """Renders batches of frames; caches the background if camera and ground do not move."""

    def __init__(self, scene: Scene, atlas: Atlas, device: torch.device) -> None:
        self.scene = scene
        self.atlas = atlas
        self.device = device
        self.light = light_of(scene.place, scene.time_of_day)
        self.cached_background: Tensor | None = None

    def paint(self, times: Curve) -> tuple[UInt8[Tensor, "t h w c"], Bool[Tensor, "o t h w"]]:
        """Render the frames at `times` and the masks of the subjects."""
        scene = self.scene
        light = self.light
        subjects = [place_subject(scene, subject, times) for subject in scene.subjects]
        airy = PLACES[scene.place].ground is None
        view = view_at(scene.camera, times, scene.act, scene.camera_sign, subjects[0].x, airy)
        clock = torch.from_numpy(times).float().to(self.device)
        background = self.background(view, clock)
        picture = background.expand(len(times), -1, -1, -1).clone(
            memory_format=torch.contiguous_format
        )
        tint = colour(light.ambient, picture)
        air = mix(colour(light.horizon, picture), colour(light.zenith, picture), 0.12)
        if scene.weather == "fog":
            rows, columns = rows_and_columns(scene.shape.height, scene.shape.width, self.device)
            picture = fog(
                picture, columns, rows, clock, air[0] * 0.85 + 0.12, scene.variation.offset
            )
        masks = _draw_sprites(
            picture, scene, self.atlas, subjects, view, times, tint * 0.8 + 0.2, air
        )
        picture = fall(picture, scene.weather, clock, scene.seed, tint[0] * 0.7 + 0.3)
        picture = apply_style(picture.clamp_(0, 1), scene.style)
        frames = rearrange(
            (picture * 255).round_().to(torch.uint8), "t c h w -> t h w c"
        ).contiguous()
        return frames, masks

    def background(self, view: View, clock: Float[Tensor, " t"]) -> Float[Tensor, "t 3 h w"]:
        """Paint sky, backdrop and ground; a single frame if neither camera nor ground moves."""
        if self.cached_background is not None:
            return self.cached_background
        scene = self.scene
        place = PLACES[scene.place]
        rays = cast_rays(view, scene.shape.height, scene.shape.width, self.device)
        picture = paint_sky(scene, rays, self.light)
        if place.backdrop and place.medium != "indoors":
            picture = paint_backdrop(picture, scene, place.backdrop, rays, self.light)
        if place.ground:
            picture = paint_ground(picture, scene, place.ground, rays, self.light, clock)
        if scene.camera == "static" and place.ground not in MOVING_GROUNDS:
            self.cached_background = picture
        return picture


def _draw_sprites(
    picture: Tensor,
    scene: Scene,
    atlas: Atlas,
    subjects: list[PlacedSprite],
    view: View,
    times: Curve,
    tint: Tensor,
    air: Tensor,
) -> Bool[Tensor, "o t h w"]:
    """Draw props, then subjects, from far to near; nearer subjects occlude farther ones."""
    haze = {"fog": 0.09}.get(scene.weather or "", 0.04 if scene.place == "underwater" else 0.015)
    for prop in sorted(scene.props, key=lambda prop: -prop.z):
        draw_sprite(picture, place_prop(prop, times), view, atlas, times, tint, air, haze)
    masks: list[Tensor] = []
    order = sorted(range(len(subjects)), key=lambda index: -float(subjects[index].z.mean()))
    drawn: dict[int, Tensor] = {}
    for index in order:
        cover = draw_sprite(picture, subjects[index], view, atlas, times, tint, air, haze)
        drawn = {other: mask & ~cover for other, mask in drawn.items()} | {index: cover}
    masks = [drawn[index] for index in range(len(subjects))]
    return torch.stack(masks)


def boxes_of(masks: Bool[Tensor, "o t h w"]) -> Float[Tensor, "o t 4"]:
    """Compute each mask's bounding box (x0 y0 x1 y1, pixels, exclusive ends; zeros if empty)."""
    height, width = masks.shape[-2:]
    rows = masks.any(3).float()
    columns = masks.any(2).float()
    first_row = rows.argmax(-1)
    first_column = columns.argmax(-1)
    last_row = height - rows.flip(-1).argmax(-1)
    last_column = width - columns.flip(-1).argmax(-1)
    boxes = torch.stack([first_column, first_row, last_column, last_row], -1).float()
    return boxes * masks.flatten(2).any(2)[..., None]
