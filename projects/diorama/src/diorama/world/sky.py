"""Painting of sky, sun, moon, stars, clouds, and the backdrop on the horizon."""

import torch
from jaxtyping import Float
from torch import Tensor

from diorama.world.camera import Rays
from diorama.world.light import Colour, Light
from diorama.world.noise import hashed, mix, noise, smoothstep
from diorama.world.scene import Scene

Picture = Float[Tensor, "t 3 h w"]

_NEBULAE: tuple[Colour, ...] = (
    (0.50, 0.12, 0.60),
    (0.12, 0.30, 0.75),
    (0.70, 0.20, 0.32),
    (0.10, 0.50, 0.50),
)


def colour(rgb: Colour, like: Tensor) -> Float[Tensor, "1 3 1 1"]:
    """Convert an RGB colour to a tensor that broadcasts over pictures."""
    return like.new_tensor(rgb).view(1, 3, 1, 1)


def over(picture: Tensor, paint: Tensor, share: Tensor) -> Tensor:
    """Blend `paint` over a picture; `share` is the opacity, [t h w]."""
    return mix(picture, paint, share[:, None])


def paint_sky(scene: Scene, rays: Rays, light: Light) -> Picture:
    """Paint the sky with sun or moon, stars and clouds."""
    height = rays.elevation.clamp(min=0)
    zenith = colour(light.zenith, height)
    horizon = colour(light.horizon, height)
    if scene.time_of_day == "sunset":
        rose = colour((0.96, 0.42, 0.36), height)
        sky = over(
            horizon.expand(len(height), -1, *height.shape[1:]), rose, smoothstep(height, 0.0, 0.32)
        )
        sky = over(sky, zenith, smoothstep(height, 0.18, 0.95))
    else:
        sky = over(
            horizon.expand(len(height), -1, *height.shape[1:]),
            zenith,
            smoothstep(height, -0.05, 0.80),
        )
    if scene.place in ("space", "moon"):
        return _paint_space(sky, scene, rays)
    if scene.time_of_day is None:
        return sky
    if scene.time_of_day == "night":
        sky = _paint_stars(sky, rays, 8.0, scene.variation.offset, 0.22)
    if scene.time_of_day != "cloudy":
        sky = _paint_sun(sky, scene, rays, light)
    return sky if scene.time_of_day == "night" else _paint_clouds(sky, scene, rays, light)


def sun_azimuth(scene: Scene) -> float:
    """Compute the azimuth of sun or moon, in radians to the right."""
    side = 1 if scene.variation.sun > 0.5 else -1
    return (
        side
        * (0.18 + 0.24 * abs(2 * scene.variation.sun - 1))
        * min(1.5, scene.shape.width / scene.shape.height)
    )


def _paint_stars(
    sky: Tensor, rays: Rays, density: float, offset: float, share: float = 0.30
) -> Tensor:
    """Paint round stars in a fraction `share` of grid cells; they must survive compression."""
    x = rays.azimuth * density + offset * 7
    y = rays.elevation * density
    column = x.floor()
    row = y.floor()
    cell = column + 57 * row
    radius = 0.05 + 0.07 * hashed(cell, 1.3)
    near_x = x - column - 0.25 - 0.5 * hashed(cell, 0.7)
    near_y = y - row - 0.25 - 0.5 * hashed(cell, 2.9)
    distance = (near_x**2 + near_y**2).sqrt()
    soft = rays.pixel * density
    star = (1 - smoothstep((distance - radius) / soft, -0.6, 0.9)) * (hashed(cell, 4.1) < share)
    return over(sky, colour((1.0, 0.98, 0.88), x), star * (0.45 + 0.5 * hashed(cell, 3.7)))


def _paint_space(sky: Tensor, scene: Scene, rays: Rays) -> Tensor:
    variation = scene.variation
    first = int(variation.palette * len(_NEBULAE)) % len(_NEBULAE)
    if scene.place == "space":
        for index, strength in ((first, 0.65), ((first + 1) % len(_NEBULAE), 0.40)):
            shift = variation.offset + index * 0.31
            cloud = noise("soft", rays.azimuth * 0.22 + shift, rays.elevation * 0.22 + shift * 1.7)
            sky = (
                sky
                + colour(_NEBULAE[index], cloud)
                * (smoothstep(cloud, 0.42, 0.85) * strength)[:, None]
            )
    sky = _paint_stars(sky, rays, 7.0, variation.offset, 0.25)
    return _paint_planet(sky, scene, rays)


def _paint_planet(sky: Tensor, scene: Scene, rays: Rays) -> Tensor:
    """Paint a planet with a lit side; it is the earth if the place is the moon."""
    variation = scene.variation
    side = sun_azimuth(scene) * 1.25
    east = (rays.azimuth - side) / 0.15
    north = (rays.elevation - 0.36) / 0.15
    distance = (east**2 + north**2).sqrt()
    disc = 1 - smoothstep((distance - 1) * 0.15 / rays.pixel, -0.7, 0.7)
    shade = (0.62 + 0.45 * (0.6 * north - 0.6 * east)).clamp(0.15, 1.1)
    if scene.place == "moon":
        land = smoothstep(noise("cloud", east * 0.12 + variation.offset, north * 0.12), 0.50, 0.56)
        paint = over(colour((0.16, 0.42, 0.88), east), colour((0.24, 0.62, 0.30), east), land)
    else:
        band = 0.5 + 0.5 * torch.sin(north * 7 + 2 * variation.accent)
        paint = over(
            colour((0.95, 0.62, 0.36), east),
            colour(((0.85, 0.42, 0.55), (0.55, 0.62, 0.95))[variation.accent > 0.5], east),
            band,
        )
    return over(sky, paint * shade[:, None], disc)


def _paint_sun(sky: Tensor, scene: Scene, rays: Rays, light: Light) -> Tensor:
    distance = (
        (rays.azimuth - sun_azimuth(scene)) ** 2 + (rays.elevation - light.sun_height) ** 2
    ).sqrt()
    if scene.time_of_day == "night":
        sky = sky + colour((0.22, 0.25, 0.36), distance) * torch.exp(-distance * 5)[:, None]
        disc = colour((0.97, 0.96, 0.86), distance)
        size = 0.085
    else:
        sky = sky + colour(light.sun, distance) * (torch.exp(-distance * 4.5) * 0.42)[:, None]
        disc = colour(
            (1.0, 0.97, 0.80) if scene.time_of_day == "day" else (1.0, 0.88, 0.55), distance
        )
        size = 0.085 if scene.time_of_day == "day" else 0.12
    return over(sky, disc, 1 - smoothstep((distance - size) / rays.pixel, -0.8, 0.8))


def _paint_clouds(sky: Tensor, scene: Scene, rays: Rays, light: Light) -> Tensor:
    """Paint cumulus clouds made of overlapping discs, in two rows."""
    variation = scene.variation
    white = mix(colour((1.0, 1.0, 1.0), sky), colour(light.horizon, sky), 0.22) * (
        colour(light.ambient, sky) * 0.85 + 0.15
    )
    shade = mix(white, colour(light.zenith, sky), 0.22)
    likely = 0.95 if scene.time_of_day == "cloudy" else 0.30 + 0.45 * variation.clouds
    for row, (level, wide) in enumerate(((0.34, 0.62), (0.60, 0.80))):
        x = rays.azimuth / wide + variation.offset * 5 + row * 3.3
        column = x.floor()
        middle = column + 0.5
        lift = level + 0.10 * (hashed(column, row + 0.5) - 0.5)
        size = 0.060 + 0.05 * hashed(column, row + 1.5)
        shown = (hashed(column, row + 2.5) < likely).float()
        body = torch.zeros_like(x)
        for bump, (shift, rise, large) in enumerate(
            ((-0.17, 0.0, 0.75), (0.0, 0.35, 1.1), (0.17, 0.05, 0.8))
        ):
            away = (x - middle - shift) * wide
            up = (
                rays.elevation - lift - size * rise * (0.7 + 0.6 * hashed(column, bump + row + 3.5))
            )
            distance = (away**2 / 1.7 + up**2).sqrt()
            body = torch.maximum(
                body, 1 - smoothstep((distance - size * large) / rays.pixel, -2.0, 1.5)
            )
        flat = smoothstep((rays.elevation - lift + size * 0.35) / rays.pixel, -2.0, 2.0)
        lit = smoothstep(rays.elevation - lift, -0.03, 0.09)
        sky = over(sky, over(shade, white, lit), body * flat * shown * 0.92)
    return sky


# Layers of each backdrop from far to near: height, frequency, haze, colour.
_RANGES: dict[str, tuple[tuple[float, float, float, Colour], ...]] = {
    "hills": ((0.15, 0.55, 0.45, (0.38, 0.66, 0.42)), (0.09, 0.75, 0.15, (0.30, 0.62, 0.26))),
    "mountains": ((0.46, 0.60, 0.35, (0.48, 0.56, 0.72)), (0.28, 0.85, 0.10, (0.40, 0.50, 0.64))),
    "dunes": ((0.17, 0.50, 0.35, (0.92, 0.70, 0.44)), (0.10, 0.70, 0.10, (0.96, 0.73, 0.42))),
    "trees": ((0.52, 2.0, 0.35, (0.22, 0.46, 0.30)), (0.36, 2.6, 0.05, (0.12, 0.36, 0.20))),
    "craters": ((0.12, 0.70, 0.10, (0.46, 0.46, 0.50)), (0.07, 1.0, 0.0, (0.38, 0.38, 0.42))),
    "candyhills": ((0.20, 0.50, 0.25, (0.98, 0.70, 0.86)), (0.12, 0.65, 0.05, (0.72, 0.90, 0.98))),
}


def paint_backdrop(sky: Picture, scene: Scene, backdrop: str, rays: Rays, light: Light) -> Picture:
    """Paint the layers on the horizon from far to near; nearer layers have more parallax."""
    air = mix(colour(light.horizon, sky), colour(light.zenith, sky), 0.12)
    ambient = colour(light.ambient, sky)
    if backdrop == "skyline":
        return _paint_skyline(sky, scene, rays, air, ambient)
    for index, (height, frequency, haze, base) in enumerate(_RANGES[backdrop]):
        x = (
            rays.azimuth * frequency
            + rays.x * 0.012 * (1 + 0.5 * index)
            + scene.variation.offset * 3
            + index * 0.37
        )
        top = height * _ridge(backdrop, x, index)
        inside = smoothstep((top - rays.elevation) / rays.pixel, -0.7, 0.9)
        lit = (0.92 + 0.16 * smoothstep(rays.elevation / height, 0.0, 1.0))[:, None]
        paint = colour(base, sky) * lit
        if backdrop == "mountains":
            line = top * 0.62 + 0.035 * torch.sin(x * 31 + index) * _triangle(x * 9)
            paint = over(
                paint,
                colour((0.97, 0.98, 1.0), sky),
                smoothstep((rays.elevation - line) / rays.pixel, -1.5, 1.5),
            )
        if backdrop == "dunes":
            paint = (
                paint * (0.90 + 0.16 * smoothstep(torch.cos(x * 7 + index * 2), -0.4, 0.6))[:, None]
            )
        sky = over(sky, mix(paint * ambient, air, haze), inside)
    return sky


def _triangle(x: Tensor) -> Tensor:
    return 1 - 2 * (torch.frac(x + 1000) - 0.5).abs() * 1.0


def _ridge(backdrop: str, x: Tensor, index: int) -> Tensor:
    """Compute the outline of a layer, about 0.3 to 1."""
    wave = 0.5 + 0.5 * torch.sin(x * 5 + index * 1.7)
    match backdrop:
        case "mountains":
            peak = _triangle(x * 1.55)
            second = _triangle(x * 2.35 + 0.4)
            return 0.28 + 0.72 * torch.maximum(peak * (0.7 + 0.3 * wave), second * 0.72)
        case "dunes":
            return 0.45 + 0.5 * torch.sin(x * 7 + index * 2).abs() ** 1.4
        case "trees":
            return 0.62 + 0.12 * wave + 0.30 * (_triangle(x * 2.6) - 0.35).clamp(min=0)
        case _:
            return 0.5 + 0.32 * wave + 0.18 * torch.sin(x * 11 + index)


def _paint_skyline(sky: Tensor, scene: Scene, rays: Rays, air: Tensor, ambient: Tensor) -> Tensor:
    """Paint two rows of buildings with large windows, lit at night."""
    dark = scene.time_of_day == "night"
    glowing = scene.time_of_day in ("night", "sunset", "dawn")
    for index, (height, wide, haze) in enumerate(((0.62, 0.20, 0.42), (0.40, 0.26, 0.05))):
        x = (
            (rays.azimuth + rays.x * 0.012 * (1 + index)) / wide
            + scene.variation.offset * 9
            + index * 4.5
        )
        column = x.floor()
        inside = x - column
        top = height * (0.40 + 0.60 * hashed(column, index + 0.3))
        soft = rays.pixel / wide
        wall = smoothstep((inside - 0.04) / soft, -0.5, 0.8) * smoothstep(
            (0.96 - inside) / soft, -0.5, 0.8
        )
        wall = wall * smoothstep((top - rays.elevation) / rays.pixel, -0.6, 0.8)
        tone = hashed(column, index + 1.9)
        base = over(colour((0.42, 0.50, 0.62), sky), colour((0.66, 0.56, 0.54), sky), tone)
        night = colour((0.07, 0.09, 0.19), sky) * (0.8 + 0.5 * tone)[:, None]
        base = night if dark else base * ambient
        across = inside * 3
        floor = rays.elevation * 11
        pane_x = (torch.frac(across) - 0.5).abs()
        pane_y = (torch.frac(floor + 20) - 0.5).abs()
        pane = smoothstep((0.27 - pane_x) / (soft * 3), -0.8, 0.8) * smoothstep(
            (0.28 - pane_y) / (rays.pixel * 11), -0.8, 0.8
        )
        pane = pane * (rays.elevation < top - 0.03)
        lit = hashed(column * 7 + across.floor() + 31 * floor.floor(), 5.5) < (0.5 if dark else 0.7)
        glass = colour((1.0, 0.84, 0.45) if glowing else (0.72, 0.86, 0.97), sky)
        strength = 0.85 if glowing else 0.55
        paint = over(base, glass, pane * lit * strength)
        sky = over(sky, mix(paint, air, haze), wall)
    return sky
