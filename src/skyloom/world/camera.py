"""Where the camera stands, what it does, and the rays through its pixels.

x is right, y is up, z is forward; the ground is y = 0 and the camera looks along +z from `HEIGHT` above it.
Screen coordinates run from -1 (bottom) to 1 (top), and as far to the sides as the frame is wide.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.world.motion import Curve, there_and_back

HEIGHT = 2.0
FOCAL = 1.8
PITCH = -0.08
DEPTH = 6.5  # where subjects stand
UNIT = DEPTH / FOCAL  # metres in half a frame height at that depth
GROUND_LEVEL = -HEIGHT / UNIT - PITCH  # the screen height of the feet of a subject

# camera: what to say
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

# How much larger the middle of the frame becomes than it is with a camera at rest.
CLOSENESS = {"zoom in": 1.26, "zoom out": 1.26, "push in": 1.2}


def camera_suits(camera: str, motion: str, directed: bool) -> bool:
    """Whether a moving camera leaves no doubt about what the subject does."""
    if camera == "static" or motion in ("near", "away", "grow", "shrink"):
        return False
    return not camera.startswith(("pan", "orbit")) if directed else camera != "follow"


@dataclass
class View:
    """The camera at each time."""

    x: Curve
    y: Curve
    z: Curve
    yaw: Curve
    pitch: Curve
    focal: Curve

    @property
    def static(self) -> bool:
        """Whether the camera stays as it is."""
        return all(np.ptp(curve) == 0 for curve in vars(self).values())


def view_at(
    camera: str, times: Curve, duration: float, sign: int, subject_x: Curve, airy: bool
) -> View:
    """The camera at each of `times`; one move takes `duration`, `sign` is the side of an orbit.

    `subject_x` (metres) is what to follow.
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
    """One ray for every pixel, [t h w] or broadcastable to it; t is 1 where the camera stands still."""

    across: Float[Tensor, "t h w"]
    up: Float[Tensor, "t h w"]
    forward: Float[Tensor, "t h w"]
    x: Float[Tensor, "t 1 1"]
    y: Float[Tensor, "t 1 1"]
    z: Float[Tensor, "t 1 1"]
    pixel: float  # the angle of one pixel, for soft edges

    def __post_init__(self) -> None:
        self.level = (self.across**2 + self.forward**2).sqrt()
        self.elevation = self.up / self.level
        self.azimuth = torch.atan2(self.across, self.forward)


def rows_and_columns(
    height: int, width: int, device: torch.device
) -> tuple[Float[Tensor, " h"], Float[Tensor, " w"]]:
    """Screen coordinates of the middles of all pixel rows (top first) and columns."""
    rows = 1 - (torch.arange(height, device=device) + 0.5) / height * 2
    columns = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * (width / height)
    return rows, columns


def cast_rays(view: View, height: int, width: int, device: torch.device) -> Rays:
    """The rays of every pixel; one set for all times if the camera stands still."""
    kept = slice(0, 1) if view.static else slice(None)

    def column(curve: Curve) -> Tensor:
        return rearrange(torch.from_numpy(curve[kept]).float().to(device), "t -> t 1 1")

    rows, columns = rows_and_columns(height, width, device)
    focal, yaw = column(view.focal), column(view.yaw)
    cosine, sine = column(np.cos(view.yaw)), column(np.sin(view.yaw))
    u, v = torch.broadcast_tensors(columns[None, None], rows[None, :, None] + column(view.pitch))
    across, forward = u * cosine + focal * sine, focal * cosine - u * sine
    pixel = 2 / height / FOCAL
    return Rays(across, v + 0 * yaw, forward, column(view.x), column(view.y), column(view.z), pixel)
