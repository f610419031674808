"""Camera position and moves over time, and the ray of every pixel.

World axes in metres: x right, y up, z forward. The ground is y = 0; the camera faces +z at `HEIGHT`
above it. Vertical screen coordinates run from -1 (bottom) to 1 (top); horizontal ones use the same
unit, from -width/height to width/height.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diorama.world.motion import Curve, there_and_back

HEIGHT = 2.0
FOCAL = 1.8
PITCH = -0.08
DEPTH = 6.5  # distance of subjects at rest
UNIT = DEPTH / FOCAL  # metres per half frame height at that depth
GROUND_LEVEL = -HEIGHT / UNIT - PITCH  # screen height of a subject's feet

# Caption phrases of each camera move.
CAMERAS: dict[str, tuple[str, ...]] = {
    "static": ("the camera stands still", "the camera does not move", "static camera"),
    "pan left": ("the camera pans left", "the camera pans to the left", "panning shot to the left"),
    "pan right": (
        "the camera pans right",
        "the camera pans to the right",
        "panning shot to the right",
    ),
    "zoom in": ("the camera zooms in", "the camera slowly zooms in", "slow zoom in"),
    "zoom out": ("the camera zooms out", "the camera slowly zooms out", "slow zoom out"),
    "push in": ("the camera moves forward", "the camera pushes in", "dolly shot forward"),
    "follow": ("the camera follows", "tracking shot", "the camera moves along"),
    "orbit": ("the camera orbits around", "orbiting shot", "the camera circles around the scene"),
    "rise": ("the camera rises", "crane shot rising up", "the camera moves up"),
    "handheld": ("handheld camera", "slightly shaky handheld camera", "the camera shakes a little"),
}

# Largest magnification of the frame's centre relative to the static camera.
CLOSENESS = {"zoom in": 1.26, "zoom out": 1.26, "push in": 1.2}


def camera_suits(camera: str, motion: str, directed: bool) -> bool:
    """Whether a camera move keeps the subject's own motion recognizable."""
    if camera == "static" or motion in ("near", "away", "grow", "shrink"):
        return False
    return not camera.startswith(("pan", "orbit")) if directed else camera != "follow"


@dataclass
class View:
    """Position (metres), angles (radians) and focal length of the camera at each time."""

    x: Curve
    y: Curve
    z: Curve
    yaw: Curve
    pitch: Curve
    focal: Curve

    @property
    def static(self) -> bool:
        """Whether no parameter changes over time."""
        return all(np.ptp(curve) == 0 for curve in vars(self).values())


def view_at(
    camera: str, times: Curve, duration: float, sign: int, subject_x: Curve, airy: bool
) -> View:
    """Compute the camera at each of `times`.

    `duration`: length of one move in seconds. `sign`: direction of an orbit. `subject_x`: position
    to follow, in metres. `airy`: the place has no ground.
    """
    still = np.zeros_like(times)
    view = View(
        still.copy(), still + HEIGHT, still.copy(), still.copy(), still + PITCH, still + FOCAL
    )
    progress = there_and_back(times / duration)
    ease = progress * progress * (3 - 2 * progress)
    match camera:
        case "pan left" | "pan right":
            view.yaw += (0.26 if camera == "pan right" else -0.26) * (ease - 0.5)
        case "zoom in":
            view.focal *= 1 + 0.38 * (ease - 0.3)
        case "zoom out":
            view.focal *= 1 + 0.38 * (0.7 - ease)
        case "push in":
            view.z += 1.9 * (ease - 0.4)
        case "follow":
            view.x += 0.6 * subject_x
        case "orbit":
            angle = sign * 0.55 * (ease - 0.5)
            view.x += DEPTH * np.sin(angle)
            view.z += DEPTH * (1 - np.cos(angle))
            view.yaw -= angle
        case "rise":
            view.y += (1.2 if airy else 1.6) * (ease - 0.2)
            view.pitch -= 0.34 * (ease - 0.2)
        case "handheld":
            view.yaw += 0.010 * np.sin(times * 7.3 + 1) + 0.007 * np.sin(times * 12.1)
            view.pitch += 0.010 * np.sin(times * 8.9) + 0.007 * np.sin(times * 13.7 + 2)
        case _:
            pass
    return view


@dataclass
class Rays:
    """One ray per pixel, broadcastable to [t h w]; t is 1 for a static camera."""

    across: Float[Tensor, "t h w"]
    up: Float[Tensor, "t h w"]
    forward: Float[Tensor, "t h w"]
    x: Float[Tensor, "t 1 1"]
    y: Float[Tensor, "t 1 1"]
    z: Float[Tensor, "t 1 1"]
    pixel: float  # angle of one pixel, for antialiased edges

    def __post_init__(self) -> None:
        self.level = (self.across**2 + self.forward**2).sqrt()
        self.elevation = self.up / self.level
        self.azimuth = torch.atan2(self.across, self.forward)


def rows_and_columns(
    height: int, width: int, device: torch.device
) -> tuple[Float[Tensor, " h"], Float[Tensor, " w"]]:
    """Compute the screen coordinates of pixel centres: rows (top first) and columns."""
    rows = 1 - (torch.arange(height, device=device) + 0.5) / height * 2
    columns = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * (width / height)
    return rows, columns


def cast_rays(view: View, height: int, width: int, device: torch.device) -> Rays:
    """Compute the ray of every pixel; a static camera has one set for all times."""
    kept = slice(0, 1) if view.static else slice(None)

    def column(curve: Curve) -> Tensor:
        return rearrange(torch.from_numpy(curve[kept]).float().to(device), "t -> t 1 1")

    rows, columns = rows_and_columns(height, width, device)
    focal = column(view.focal)
    yaw = column(view.yaw)
    cosine = column(np.cos(view.yaw))
    sine = column(np.sin(view.yaw))
    u, v = torch.broadcast_tensors(columns[None, None], rows[None, :, None] + column(view.pitch))
    return Rays(
        across=u * cosine + focal * sine,
        up=v + 0 * yaw,
        forward=focal * cosine - u * sine,
        x=column(view.x),
        y=column(view.y),
        z=column(view.z),
        pixel=2 / height / FOCAL,
    )
