"""Weather particles and fog. Particles are few and large, so that a small model can learn them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diorama.world.light import Colour
from diorama.world.noise import mix, noise, smoothstep


@dataclass(frozen=True)
class Weather:
    """Caption phrases and particles of a weather.

    `speed` is in half screen heights per second, negative for down; `radius` in half screen
    heights; `length` is the ratio of a particle's length to its width.
    """

    phrases: tuple[str, ...]
    count: int = 0
    speed: float = 0.0
    radius: float = 0.0
    length: float = 1.0
    colours: tuple[Colour, ...] = ((1.0, 1.0, 1.0),)
    opacity: float = 0.9
    ring: bool = False


WEATHERS: dict[str, Weather] = {
    "rain": Weather(
        ("in the rain", "in heavy rain", "while it is raining"),
        26, -1.9, 0.011, 6.0, ((0.80, 0.88, 1.0),), 0.55,
    ),
    "snow": Weather(("in falling snow", "while snow falls", "during a snowfall"), 26, -0.45, 0.034),
    "fog": Weather(("in the fog", "in thick mist", "in the mist")),
    "leaves": Weather(
        ("with falling autumn leaves", "as leaves fall", "while autumn leaves fall"),
        10, -0.40, 0.060, 0.6, ((0.85, 0.45, 0.10), (0.92, 0.68, 0.15), (0.72, 0.25, 0.10)),
    ),
    "petals": Weather(
        ("with falling petals", "as cherry blossom petals fall", "among falling petals"),
        12, -0.32, 0.052, 0.6, ((1.0, 0.72, 0.82), (1.0, 0.86, 0.92)),
    ),
    "confetti": Weather(
        ("with confetti falling", "in a shower of confetti"),
        14, -0.55, 0.050, 0.6,
        ((0.95, 0.20, 0.30), (0.20, 0.60, 0.95), (1.0, 0.85, 0.20), (0.30, 0.80, 0.40)),
    ),
    "bubbles": Weather(
        ("with bubbles rising", "among rising bubbles", "surrounded by bubbles"),
        12, 0.45, 0.050, 1.0, ((0.85, 0.97, 1.0),), 0.75, ring=True,
    ),
}  # fmt: skip


def fall(
    frames: Float[Tensor, "t 3 h w"],
    weather: str | None,
    times: Float[Tensor, " t"],
    seed: int,
    tint: Float[Tensor, "3 1 1"],
) -> Float[Tensor, "t 3 h w"]:
    """Draw weather particles over frames; None and fog return the frames unchanged."""
    kind = WEATHERS[weather] if weather else None
    if kind is None or not kind.count:
        return frames
    if weather == "rain":
        frames = frames * 0.88 + 0.03
    height, width = frames.shape[-2:]
    aspect = width / height
    count = round(kind.count * max(1.0, aspect))
    random = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed % 2**31)).to(
        frames.device
    )
    near = 0.8 + 0.5 * random[:, 2]
    tall = 2 * 1.2
    clock = times[:, None]
    y = (random[:, 1] * tall + kind.speed * clock * near) % tall - tall / 2
    sway = 0.0 if weather == "rain" else 0.06
    x = (random[:, 0] * 2 - 1) * (aspect + 0.1) + sway * torch.sin(clock * 2 + random[:, 3] * 6.28)
    for index in range(count):
        radius = kind.radius * float(near[index])
        colour = frames.new_tensor(kind.colours[index % len(kind.colours)]).view(3, 1, 1) * tint
        turn = float(random[index, 4]) * 6.28 + (
            0 if kind.length == 1 or weather == "rain" else clock[:, 0] * 2.5
        )
        _draw(frames, x[:, index], y[:, index], radius, turn, kind, colour)
    return frames


def _draw(
    frames: Tensor,
    x: Tensor,
    y: Tensor,
    radius: float,
    turn: Tensor | float,
    kind: Weather,
    colour: Tensor,
) -> None:
    """Draw one particle into every frame, in place, within a small window around it."""
    height, width = frames.shape[-2:]
    reach_y = int(radius * max(1.0, kind.length) * height / 2) + 2
    reach_x = int(radius * height / 2) + 2 if kind.length >= 1 else reach_y
    column = ((x / (width / height) + 1) / 2 * width).floor().long()
    row = ((1 - y) / 2 * height).floor().long()
    dx = (
        (torch.arange(-reach_x, reach_x + 1, device=frames.device)[None] + column[:, None] + 0.5)
        / height
        * 2
    )
    dx = (dx - width / height - x[:, None])[:, None, :]
    dy = (
        1
        - (torch.arange(-reach_y, reach_y + 1, device=frames.device)[None] + row[:, None] + 0.5)
        / height
        * 2
    )
    dy = (dy - y[:, None])[:, :, None]
    if kind.length > 1:
        square = (dx / radius) ** 2 + (dy / (radius * kind.length)) ** 2
    elif kind.length < 1:
        turn = torch.as_tensor(turn).expand(len(x))[:, None, None]
        along = dx * turn.cos() + dy * turn.sin()
        beside = dy * turn.cos() - dx * turn.sin()
        square = (along / radius) ** 2 + (beside / (radius * kind.length)) ** 2
    else:
        square = (dx**2 + dy**2) / radius**2
    if kind.ring:
        shape = torch.exp(-((((square + 1e-6).sqrt() - 0.85) / 0.2) ** 2)) + 0.15 * (square < 0.8)
    else:
        shape = 1 - smoothstep(square, 0.55, 1.2)
    alpha = shape.clamp(0, 1) * kind.opacity
    for frame, r, c, a in zip(
        frames, (row - reach_y).tolist(), (column - reach_x).tolist(), alpha, strict=True
    ):
        top = max(0, r)
        left = max(0, c)
        window = frame[:, top : max(top, r + a.shape[0]), left : max(left, c + a.shape[1])]
        if window.numel():
            share = a[top - r : top - r + window.shape[1], left - c : left - c + window.shape[2]]
            window.add_((colour - window) * share)


def fog(
    frames: Float[Tensor, "t 3 h w"],
    columns: Float[Tensor, " w"],
    rows: Float[Tensor, " h"],
    times: Float[Tensor, " t"],
    colour: Float[Tensor, "3 1 1"],
    offset: float,
) -> Float[Tensor, "t 3 h w"]:
    """Blend slowly drifting fog over the background."""
    drift = noise(
        "cloud",
        columns[None, None] * 0.16 + offset + times.view(-1, 1, 1) * 0.02,
        rows[None, :, None] * 0.22,
    )
    share = (0.42 + 0.5 * (drift - 0.3) + 0.12 * smoothstep(-rows, -0.6, 0.6)[None, :, None]).clamp(
        0, 0.8
    )
    return mix(frames, colour, share[:, None])
