"""Projection and drawing of sprites, with shadow, reflection and mask."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from diorama.world.assets import Atlas
from diorama.world.camera import DEPTH, FOCAL, UNIT, View, rows_and_columns
from diorama.world.motion import Curve, pose_at
from diorama.world.noise import mix, smoothstep
from diorama.world.scene import Prop, Scene
from diorama.world.sky import Picture
from diorama.world.style import recolour
from diorama.world.subject import Subject

ATLAS_FPS = 8


@dataclass
class PlacedSprite:
    """A sprite's pose at each time; position and size in metres."""

    noun: str
    x: Curve
    y: Curve  # of the feet
    z: Curve
    size: Curve
    roll: Curve
    stretch_x: Curve
    stretch_y: Curve
    nominal: float  # typical size on the screen, in half frame heights
    pace: float = 1.0
    phase: float = 0.0
    colour: str | None = None
    submerged: bool = False
    shadow: float = 0.0


def place_subject(scene: Scene, subject: Subject, times: Curve) -> PlacedSprite:
    """Compute a subject's pose at each time, in metres."""
    pose = pose_at(subject.motion, subject.path, times, scene.act)
    depth = DEPTH * pose.depth
    tilt = np.radians(subject.tilt)
    roll = pose.roll
    if subject.tilt and subject.motion == "take off":
        roll = roll + subject.facing * (np.pi / 2 - tilt)
    elif subject.tilt and subject.direction:
        roll = roll - subject.facing * tilt
    airborne = scene.place in ("sky", "space", "underwater")
    return PlacedSprite(
        noun=subject.noun,
        x=(pose.x + subject.offset) * UNIT,
        y=pose.height * UNIT,
        z=depth,
        size=pose.scale * subject.path.size * UNIT,
        roll=roll,
        stretch_x=pose.stretch_x * (-1 if subject.mirrored else 1),
        stretch_y=pose.stretch_y,
        nominal=subject.path.size,
        pace=pose.pace,
        phase=subject.phase,
        colour=subject.colour,
        submerged=subject.submerged,
        shadow=0.0 if airborne or subject.submerged else 0.40,
    )


def place_prop(prop: Prop, times: Curve) -> PlacedSprite:
    """Return the constant pose of a prop."""
    one = np.ones_like(times)
    return PlacedSprite(
        noun=prop.noun,
        x=prop.x * one,
        y=0 * one,
        z=prop.z * one,
        size=prop.size * one,
        roll=0 * one,
        stretch_x=one,
        stretch_y=one,
        nominal=prop.size / prop.z * FOCAL,
        shadow=0.30,
    )


def _column(curve: Curve, device: torch.device) -> Float[Tensor, "t 1 1"]:
    return rearrange(torch.from_numpy(np.asarray(curve)).float().to(device), "t -> t 1 1")


@dataclass
class ProjectedSprite:
    """A projected sprite at each time, in screen units.

    `x`, `y`: centre. `half`: half the size. `foot_y`, `ground_y`: height of the feet, and of the
    ground or water below. `ahead`: distance from the camera in metres.
    """

    x: Curve
    y: Curve
    half: Curve
    foot_y: Curve
    ground_y: Curve
    ahead: Curve


def project(placed: PlacedSprite, view: View, foot: float) -> ProjectedSprite:
    """Project a sprite; `foot` is the value of `foot_of`."""
    cosine = np.cos(view.yaw)
    sine = np.sin(view.yaw)
    beside = placed.x - view.x
    forward = placed.z - view.z
    ahead = np.maximum(beside * sine + forward * cosine, 0.5)
    across = beside * cosine - forward * sine
    half = placed.size / 2 / ahead * view.focal
    foot_y = (placed.y - view.y) / ahead * view.focal - view.pitch
    ground_y = -view.y / ahead * view.focal - view.pitch
    return ProjectedSprite(
        x=across / ahead * view.focal,
        y=foot_y + half * foot * placed.stretch_y,
        half=half,
        foot_y=foot_y,
        ground_y=ground_y,
        ahead=ahead,
    )


def sprite_frames(
    atlas: Atlas, placed: PlacedSprite, times: Curve, device: torch.device
) -> tuple[Float[Tensor, "n 4 s s"], np.ndarray, float]:
    """Load a sprite: its distinct frames (premultiplied), frame index per time, and `foot_of`."""
    art = atlas.frames(placed.noun)
    index = np.floor(times * ATLAS_FPS * placed.pace + placed.phase * len(art)).astype(
        np.int64
    ) % len(art)
    distinct, shown = np.unique(index, return_inverse=True)
    sprites = (
        rearrange(art[torch.from_numpy(distinct)].to(device), "n h w c -> n c h w").float() / 255
    )
    if placed.colour:
        sprites = recolour(sprites, placed.colour)
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1), shown, foot_of(art)


def foot_of(art: Tensor) -> float:
    """Distance from the centre to the lowest opaque row, as a fraction of half the size."""
    solid = (art[0, :, :, 3] > 100).any(1).nonzero()
    size = art.shape[1]
    return float(solid.max() + 1) / size * 2 - 1 if len(solid) else 1.0


def draw_shadow(picture: Picture, placed: PlacedSprite, screen: ProjectedSprite) -> None:
    """Draw a soft dark ellipse on the ground; it fades with the sprite's height."""
    frames, _, height, width = picture.shape
    lift = np.clip(placed.y / np.maximum(placed.size, 0.1), 0, 3)
    strength = placed.shadow * np.exp(-1.3 * lift)
    half_x = screen.half * (0.62 + 0.25 * lift)
    half_y = np.maximum(half_x * 0.20, 1.5 / height)
    rows, columns = rows_and_columns(height, width, picture.device)
    for index in range(frames):
        top, bottom = _span(
            1 - (screen.ground_y[index] + 2 * half_y[index]),
            1 - (screen.ground_y[index] - 2 * half_y[index]),
            height,
            2,
        )
        left, right = _span(
            screen.x[index] - 2 * half_x[index] + width / height,
            screen.x[index] + 2 * half_x[index] + width / height,
            width,
            2 * width / height,
        )
        if top >= bottom or left >= right or strength[index] < 0.02:
            continue
        dx = (columns[left:right] - float(screen.x[index])) / float(half_x[index])
        dy = (rows[top:bottom] - float(screen.ground_y[index])) / float(half_y[index])
        dark = torch.exp(-1.2 * (dx[None] ** 2 + dy[:, None] ** 2)) * float(strength[index])
        picture[index, :, top:bottom, left:right] *= 1 - dark


def _span(low: float, high: float, pixels: int, whole: float) -> tuple[int, int]:
    """Convert an interval, measured from the top or left edge, to a pixel range in the frame."""
    start = max(0, int(np.floor(low / whole * pixels)))
    stop = min(pixels, int(np.ceil(high / whole * pixels)))
    return start, stop


@dataclass
class SpriteWindows:
    """A square of `side` pixels around a sprite in every frame: the pixels that it may cover."""

    top: np.ndarray
    left: np.ndarray
    side: int
    rows: Float[Tensor, "t side"]  # screen coordinates of the pixel centres
    columns: Float[Tensor, "t side"]


def windows_around(
    screen: ProjectedSprite, placed: PlacedSprite, height: int, width: int, device: torch.device
) -> SpriteWindows:
    """Compute squares that contain the sprite at any rotation."""
    stretch = np.maximum(np.abs(placed.stretch_x), np.abs(placed.stretch_y))
    corner = np.where(np.abs(np.sin(2 * placed.roll)) > 1e-3, 1.4143, 1.0)
    side = int(np.ceil((screen.half * stretch * corner).max() * height)) + 2
    top = np.floor((1 - screen.y) / 2 * height - side / 2).astype(np.int64)
    left = np.floor((screen.x + width / height) / 2 * height - side / 2).astype(np.int64)
    steps = np.arange(side)
    rows = 1 - (top[:, None] + steps + 0.5) / height * 2
    columns = (left[:, None] + steps + 0.5) / height * 2 - width / height
    return SpriteWindows(
        top,
        left,
        side,
        torch.from_numpy(rows).float().to(device),
        torch.from_numpy(columns).float().to(device),
    )


def sample(
    sprites: Float[Tensor, "t 4 s s"],
    placed: PlacedSprite,
    screen: ProjectedSprite,
    windows: SpriteWindows,
) -> Float[Tensor, "t 4 side side"]:
    """Resample each sprite into its window: scaled, stretched, rotated."""
    device = sprites.device
    half = _column(screen.half, device)
    right = (windows.columns[:, None, :] - _column(screen.x, device)) / half
    up = (windows.rows[:, :, None] - _column(screen.y, device)) / half
    cosine = _column(np.cos(placed.roll), device)
    sine = _column(np.sin(placed.roll), device)
    x = (right * cosine + up * sine) / _column(placed.stretch_x, device)
    y = (up * cosine - right * sine) / _column(placed.stretch_y, device)
    return F.grid_sample(sprites, torch.stack([x, -y], -1), align_corners=False)


def blend(
    picture: Picture, paint: Float[Tensor, "t 4 side side"], windows: SpriteWindows
) -> Bool[Tensor, "t h w"]:
    """Blend premultiplied windows over every frame, in place; return the mask of opaque pixels."""
    height, width = picture.shape[-2:]
    mask = torch.zeros(len(picture), height, width, dtype=torch.bool, device=picture.device)
    for index, (top, left) in enumerate(
        zip(windows.top.tolist(), windows.left.tolist(), strict=True)
    ):
        y0 = max(0, top)
        y1 = min(height, top + windows.side)
        x0 = max(0, left)
        x1 = min(width, left + windows.side)
        if y0 >= y1 or x0 >= x1:
            continue
        seen = paint[index, :, y0 - top : y1 - top, x0 - left : x1 - left]
        picture[index, :, y0:y1, x0:x1].mul_(1 - seen[3:]).add_(seen[:3])
        mask[index, y0:y1, x0:x1] = seen[3] > 0.5
    return mask


def draw_sprite(
    picture: Picture,
    placed: PlacedSprite,
    view: View,
    atlas: Atlas,
    times: Curve,
    tint: Float[Tensor, "1 3 1 1"],
    air: Float[Tensor, "1 3 1 1"],
    haze: float,
) -> Bool[Tensor, "t h w"]:
    """Draw a sprite with its shadow or reflection into every frame, in place; return its mask."""
    height, width = picture.shape[-2:]
    sprites, shown, foot = sprite_frames(atlas, placed, times, picture.device)
    if placed.nominal * height < 1.2 * sprites.shape[-1]:
        sprites = F.avg_pool2d(sprites, 2)
    sprites = sprites[torch.from_numpy(shown)]
    screen = project(placed, view, foot)
    windows = windows_around(screen, placed, height, width, picture.device)
    paint = sample(sprites, placed, screen, windows)
    share = _column(1 - np.exp(-np.maximum(screen.ahead - DEPTH, 0) * haze), picture.device)[
        :, None
    ]
    paint = torch.cat([mix(paint[:, :3] * tint, air * paint[:, 3:], share), paint[:, 3:]], 1)
    if placed.shadow:
        draw_shadow(picture, placed, screen)
    if placed.submerged:
        line = torch.from_numpy(screen.ground_y).float().to(picture.device)[:, None]
        draw_reflection(picture, sprites, placed, screen, tint)
        paint = paint * smoothstep((windows.rows - line) * height / 2, -0.7, 0.7)[:, None, :, None]
    return blend(picture, paint, windows)


def draw_reflection(
    picture: Picture,
    sprites: Float[Tensor, "t 4 s s"],
    placed: PlacedSprite,
    screen: ProjectedSprite,
    tint: Float[Tensor, "1 3 1 1"],
) -> None:
    """Draw a faint mirror image of the sprite below the water line."""
    height, width = picture.shape[-2:]
    flipped = replace(placed, roll=-placed.roll, stretch_y=-placed.stretch_y)
    mirrored = replace(screen, y=2 * screen.ground_y - screen.y)
    windows = windows_around(mirrored, flipped, height, width, picture.device)
    line = torch.from_numpy(screen.ground_y).float().to(picture.device)[:, None]
    wet = smoothstep((line - windows.rows) * height / 2, -0.7, 0.7) * 0.30
    paint = sample(sprites, flipped, mirrored, windows) * wet[:, None, :, None]
    blend(picture, torch.cat([paint[:, :3] * tint, paint[:, 3:]], 1), windows)
