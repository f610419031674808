"""Painting of everything below the horizon, and of walls in indoor scenes."""

import torch
from jaxtyping import Float
from torch import Tensor

from diorama.world.camera import HEIGHT, Rays
from diorama.world.light import Colour, Light
from diorama.world.noise import hashed, mix, noise, smoothstep
from diorama.world.scene import Scene
from diorama.world.sky import Picture, colour, over, sun_azimuth

# The two colours of each plain ground, mixed by low-frequency noise.
_PLAIN: dict[str, tuple[Colour, Colour]] = {
    "grass": ((0.36, 0.68, 0.22), (0.50, 0.79, 0.30)),
    "forest": ((0.20, 0.40, 0.17), (0.32, 0.48, 0.20)),
    "sand": ((0.95, 0.75, 0.46), (0.99, 0.84, 0.58)),
    "snow": ((0.86, 0.91, 0.98), (0.98, 0.99, 1.0)),
    "moon": ((0.48, 0.48, 0.51), (0.64, 0.64, 0.66)),
    "seabed": ((0.62, 0.70, 0.56), (0.78, 0.82, 0.62)),
    "field": ((0.54, 0.44, 0.24), (0.46, 0.64, 0.24)),
    "candy": ((0.99, 0.76, 0.86), (1.0, 0.89, 0.93)),
    "beach": ((0.94, 0.83, 0.61), (0.99, 0.89, 0.69)),
}
_WALLS: tuple[Colour, ...] = (
    (0.72, 0.85, 0.92),
    (0.95, 0.86, 0.70),
    (0.93, 0.78, 0.78),
    (0.76, 0.88, 0.76),
    (0.84, 0.79, 0.93),
)
_CURTAINS: tuple[Colour, ...] = ((0.75, 0.06, 0.12), (0.40, 0.12, 0.58), (0.10, 0.22, 0.58))
WALL_DEPTH = 10.0
MOVING_GROUNDS = frozenset({"water", "beach", "seabed"})


class Floor:
    """Intersection of each ray with the plane y = 0.

    `x`, `z` and `distance` are in metres. `detail` in (0, 1] attenuates patterns with distance.
    `below` is the antialiased mask of rays below the horizon.
    """

    def __init__(self, rays: Rays) -> None:
        reach = rays.y / (-rays.up).clamp(min=0.004)
        self.x = rays.x + rays.across * reach
        self.z = rays.z + rays.forward * reach
        self.distance = (reach * rays.level).clamp(max=400)
        self.detail = (7 / self.distance.clamp(min=1)).clamp(max=1)
        self.below = smoothstep(-rays.up / rays.pixel / 1.8, 0.0, 1.2)


def paint_ground(
    sky: Picture, scene: Scene, ground: str, rays: Rays, light: Light, times: Float[Tensor, " t"]
) -> Picture:
    """Paint the ground of the place over the sky picture; water moves with time."""
    floor = Floor(rays)
    ambient = colour(light.ambient, sky)
    if ground == "cloudsea":
        return _cloudsea(sky, scene, rays, light)
    if ground == "water":
        paint = _water(scene, rays, floor, light, times, sky)
    elif ground == "beach":
        paint = _beach(scene, rays, floor, light, times, sky)
    elif ground == "road":
        paint = _road(scene, floor, ambient, sky)
    elif ground in ("wood", "stage"):
        return _indoors(sky, scene, ground, rays, floor, light)
    else:
        paint = _plain(scene, ground, floor, sky) * ambient
        if ground == "seabed":
            return _seabed(sky, paint, scene, rays, floor, light, times)
    air = mix(colour(light.horizon, sky), colour(light.zenith, sky), 0.12)
    paint = over(paint, air, smoothstep(floor.distance, 20, 160) * 0.35)
    return over(sky, paint, floor.below)


def _plain(scene: Scene, ground: str, floor: Floor, sky: Tensor) -> Tensor:
    """Paint two tones mixed by low-frequency noise, with a pattern per ground."""
    first, second = _PLAIN[ground]
    offset = scene.variation.offset
    patch = noise("soft", floor.x * 0.035 + offset, floor.z * 0.035)
    paint = over(colour(first, sky), colour(second, sky), smoothstep(patch, 0.25, 0.75))
    match ground:
        case "sand":
            ripple = torch.sin(
                floor.z * 2.2 + 5 * (noise("soft", floor.x * 0.05, floor.z * 0.05) - 0.5) * 6
            )
            return paint * (1 + 0.05 * ripple * floor.detail)[:, None]
        case "field":
            rows = smoothstep(torch.sin(floor.x * 2.2), -0.4, 0.6)
            return mix(
                paint,
                over(colour(first, sky), colour(second, sky), rows),
                floor.detail.sqrt()[:, None],
            )
        case "candy":
            stripe = smoothstep(torch.sin(floor.x * 0.9 + torch.sin(floor.z * 0.5)), 0.0, 0.3)
            return over(paint, colour((0.76, 0.93, 0.98), sky), stripe * floor.detail.sqrt() * 0.8)
        case "moon":
            hollow = noise("soft", floor.x * 0.07 + 0.4 + offset, floor.z * 0.07)
            return (
                paint
                * (
                    1
                    - 0.24 * smoothstep(hollow, 0.60, 0.66)
                    + 0.14 * smoothstep(hollow, 0.54, 0.60)
                )[:, None]
            )
        case _:
            return paint


def _water(
    scene: Scene, rays: Rays, floor: Floor, light: Light, times: Tensor, sky: Tensor
) -> Tensor:
    clock = times.view(-1, 1, 1)
    swell = noise("cloud", floor.x * 0.022 + clock * 0.020, floor.z * 0.050 + clock * 0.030) - 0.5
    chop = noise("soft", floor.x * 0.06 - clock * 0.03, floor.z * 0.14 + clock * 0.02) - 0.5
    wave = (swell + 0.7 * chop) * floor.detail.sqrt()
    down = (-rays.elevation).clamp(min=0)
    dark = scene.time_of_day == "night"
    deep = (
        colour((0.02, 0.08, 0.20), sky)
        if dark
        else colour((0.06, 0.42, 0.62), sky) * colour(light.ambient, sky)
    )
    mirror = over(
        colour(light.horizon, sky), colour(light.zenith, sky), smoothstep(down * 0.8, 0.0, 0.6)
    )
    if scene.time_of_day == "sunset":
        mirror = over(mirror, colour((0.96, 0.45, 0.36), sky), smoothstep(down, 0.0, 0.3) * 0.6)
    share = 0.22 + 0.62 * torch.exp(-down * 4.0)
    paint = over(deep, mirror, (share + wave * 0.5).clamp(0, 1))
    crest = smoothstep(wave, 0.10, 0.30)
    paint = paint + (colour(light.ambient, sky) * (0.10 if dark else 0.16)) * crest[:, None]
    if scene.time_of_day != "cloudy":
        beam = torch.exp(-(((rays.azimuth - sun_azimuth(scene)) / (0.10 + 0.22 * down)) ** 2))
        paint = over(
            paint,
            colour(light.sun, sky),
            beam * smoothstep(wave, -0.05, 0.25) * (0.55 if dark else 0.65),
        )
    return paint


def _beach(
    scene: Scene, rays: Rays, floor: Floor, light: Light, times: Tensor, sky: Tensor
) -> Tensor:
    """Paint sand in front, then foam, then the sea."""
    clock = times.view(-1, 1, 1)
    ambient = colour(light.ambient, sky)
    curve = 5 * (
        noise("soft", floor.x * 0.02 + scene.variation.offset, torch.full_like(floor.x, 0.3)) - 0.5
    )
    shore = floor.z - 9.5 - 0.7 * torch.sin(clock * 1.5 + scene.variation.offset * 6) - curve
    sand = _plain(scene, "beach", floor, sky) * ambient
    sand = sand * (1 - 0.20 * smoothstep(shore, -2.2, -0.6))[:, None]
    shallow = (
        colour((0.30, 0.78, 0.80), sky) * ambient
        if scene.time_of_day != "night"
        else colour((0.06, 0.20, 0.36), sky)
    )
    sea = over(shallow, _water(scene, rays, floor, light, times, sky), smoothstep(shore, 0.0, 12))
    paint = over(sand, sea, smoothstep(shore, -0.2, 0.4))
    foam = torch.exp(-(((shore - 0.3) / 0.5) ** 2)) + 0.55 * torch.exp(
        -(((shore - 4.0 - 0.6 * torch.sin(clock * 1.1)) / 0.5) ** 2)
    )
    return over(paint, ambient * 0.85 + 0.15, foam.clamp(0, 0.9))


def _road(scene: Scene, floor: Floor, ambient: Tensor, sky: Tensor) -> Tensor:
    dark = scene.time_of_day == "night"
    lane = floor.z - 6.4
    street = colour((0.20, 0.21, 0.27), sky) if dark else colour((0.37, 0.38, 0.42), sky) * ambient
    pavement = (
        colour((0.38, 0.38, 0.50), sky) if dark else colour((0.70, 0.69, 0.68), sky) * ambient
    )
    dash = (1 - smoothstep(lane.abs(), 0.10, 0.20)) * (
        1 - smoothstep((torch.frac(floor.x * 0.25 + 100) - 0.3).abs(), 0.24, 0.28)
    )
    paint = over(street.expand_as(sky[:, :, :1, :1]), colour((0.95, 0.86, 0.42), sky), dash * 0.9)
    edge = smoothstep(lane.abs(), 3.3, 3.5)
    paint = over(paint, pavement, edge)
    if dark:
        lamp = (
            torch.exp(-(((torch.frac(floor.x / 9 + scene.variation.offset + 100) - 0.5) * 6) ** 2))
            * floor.detail
        )
        paint = paint + colour((0.30, 0.20, 0.08), sky) * lamp[:, None]
    return paint


def _cloudsea(sky: Tensor, scene: Scene, rays: Rays, light: Light) -> Tensor:
    """Paint three banks of round cloud tops; nearer banks are lower and larger."""
    dark = scene.time_of_day == "night"
    tone = (
        colour((0.34, 0.38, 0.62), sky)
        if dark
        else mix(colour(light.ambient, sky), colour(light.horizon, sky), 0.25)
    )
    shade = mix(tone * colour((0.80, 0.86, 0.96), sky), colour(light.zenith, sky), 0.18)
    for bank, (level, wide) in enumerate(((-0.03, 0.22), (-0.14, 0.32), (-0.29, 0.46))):
        x = (
            (rays.azimuth + rays.x * 0.02 * (bank + 1)) / wide
            + scene.variation.offset * 7
            + bank * 3.7
        )
        top = torch.full_like(x, -1.0)
        for shift in (0.0, 0.5):
            column = (x + shift).floor()
            away = (x + shift - column - 0.5) * 2
            size = wide * (0.36 + 0.22 * hashed(column, bank + shift + 0.4))
            round_top = size * (1.0 - (away / 1.25) ** 2).clamp(min=0).sqrt()
            top = torch.maximum(top, round_top)
        edge = level - wide * 0.35 + top
        lit = smoothstep(edge - rays.elevation, 0.30 * wide, -0.02)
        paint = over(shade.expand(len(lit), -1, *lit.shape[1:]), tone, lit)
        air = mix(colour(light.horizon, sky), colour(light.zenith, sky), 0.12)
        paint = mix(paint, air, (0.45, 0.2, 0.0)[bank])
        sky = over(sky, paint, smoothstep((edge - rays.elevation) / rays.pixel, -1.0, 1.5))
    return sky


def _seabed(
    sky: Tensor, paint: Tensor, scene: Scene, rays: Rays, floor: Floor, light: Light, times: Tensor
) -> Tensor:
    """Paint sand under water, with slow caustics and soft light rays."""
    clock = times.view(-1, 1, 1)
    web = (noise("soft", floor.x * 0.07 + clock * 0.02, floor.z * 0.07 + clock * 0.015) - 0.5).abs()
    paint = paint * colour((0.62, 0.90, 0.98), sky)
    paint = over(
        paint,
        colour((0.80, 1.0, 0.95), sky),
        (1 - smoothstep(web, 0.0, 0.10)) * floor.detail * 0.35,
    )
    paint = over(paint, colour(light.horizon, sky) * 1.15, smoothstep(floor.distance, 5, 26) * 0.92)
    picture = over(sky, paint, floor.below)
    slant = rays.azimuth + 0.35 * rays.elevation
    beam = noise(
        "soft",
        slant * 0.42 + scene.variation.offset + clock * 0.008,
        torch.full_like(slant, 0.4) + clock * 0.01,
    )
    glow = smoothstep(beam, 0.50, 0.85) * smoothstep(rays.elevation, -0.25, 0.6)
    return picture + colour((0.30, 0.50, 0.48), sky) * glow[:, None] * 0.8


def _indoors(
    sky: Tensor, scene: Scene, ground: str, rays: Rays, floor: Floor, light: Light
) -> Tensor:
    """Paint a floor and a wall perpendicular to the view."""
    variation = scene.variation
    reach = (WALL_DEPTH - rays.z) / rays.forward.clamp(min=0.05)
    x = rays.x + rays.across * reach
    y = rays.y + rays.up * reach
    above = smoothstep(y / (rays.pixel * WALL_DEPTH), -0.8, 0.8)
    if ground == "wood":
        board = (floor.x * 0.8).floor()
        paint = (
            colour((0.68, 0.46, 0.27), sky)
            * (0.84 + 0.28 * hashed(board, 0.3))[:, None]
            * colour(light.ambient, sky)
        )
        return over(paint, _wall(sky, scene, x, y, light), above)
    boards = colour((0.44, 0.27, 0.18), sky) * (0.9 + 0.12 * ((floor.x * 0.8).floor() % 2))[:, None]
    spot = torch.exp(-(((floor.x / 3.2) ** 2 + ((floor.z - 6.5) / 2.6) ** 2) ** 2))
    boards = boards * 0.55 + colour((1.0, 0.93, 0.78), sky) * (0.45 * spot)[:, None]
    cloth = colour(_CURTAINS[int(variation.palette * 3) % 3], sky)
    fold = 0.55 + 0.40 * torch.sin(x * 1.9 + 0.3 * torch.sin(y)).abs()
    glow = 0.45 + 0.65 * torch.exp(-((x / 5) ** 2))
    return over(boards, cloth * (fold * glow)[:, None], above)


def _wall(sky: Tensor, scene: Scene, x: Tensor, y: Tensor, light: Light) -> Tensor:
    variation = scene.variation
    tone = colour(light.ambient, sky) * 0.6 + 0.4
    paint = colour(_WALLS[int(variation.palette * 5) % 5], sky) * tone
    paint = over(paint, colour((0.96, 0.95, 0.91), sky) * tone, 1 - smoothstep(y, 0.30, 0.40))
    middle = (variation.accent - 0.5) * 7
    side = (x - middle).abs()
    lift = (y - HEIGHT - 1.6).abs()
    frame = (1 - smoothstep(side, 1.85, 1.95)) * (1 - smoothstep(lift, 1.35, 1.45))
    pane = (1 - smoothstep(side, 1.60, 1.70)) * (1 - smoothstep(lift, 1.10, 1.20))
    bar = smoothstep(torch.minimum(side, lift), 0.06, 0.14)
    air = over(colour(light.horizon, sky), colour(light.zenith, sky), smoothstep(y, 1.5, 5.0))
    paint = over(paint, colour((0.97, 0.96, 0.93), sky) * tone, frame)
    return over(paint, air, pane * bar)
