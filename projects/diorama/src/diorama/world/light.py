"""Lighting of each time of day: colours of sky, sun and ambient light, as RGB in [0, 1]."""

from dataclasses import dataclass

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Light:
    """Colours of one time of day; `sun_height` is the elevation of sun or moon in radians."""

    zenith: Colour
    horizon: Colour
    sun: Colour
    ambient: Colour
    sun_height: float
    phrases: tuple[str, ...] = ()


TIMES: dict[str, Light] = {
    "day": Light(
        (0.20, 0.50, 0.95), (0.74, 0.90, 1.0), (1.0, 0.97, 0.85), (1.0, 1.0, 1.0), 0.36,
        ("on a sunny day", "in daylight", "under a blue sky", "during the day", "in the sunshine"),
    ),
    "sunset": Light(
        (0.36, 0.22, 0.52), (1.0, 0.62, 0.28), (1.0, 0.75, 0.35), (1.0, 0.82, 0.70), 0.10,
        ("at sunset", "at dusk", "in the evening light", "as the sun sets", "under an orange sky"),
    ),
    "dawn": Light(
        (0.45, 0.62, 0.92), (1.0, 0.80, 0.78), (1.0, 0.88, 0.75), (1.0, 0.93, 0.93), 0.12,
        ("at dawn", "at sunrise", "in the early morning", "under a pink morning sky"),
    ),
    "night": Light(
        (0.02, 0.03, 0.12), (0.12, 0.17, 0.40), (0.90, 0.93, 1.0), (0.56, 0.60, 0.88), 0.36,
        ("at night", "in the moonlight", "under the moon", "on a dark night", "under a night sky"),
    ),
    "cloudy": Light(
        (0.52, 0.58, 0.66), (0.75, 0.79, 0.83), (0.8, 0.8, 0.8), (0.88, 0.90, 0.94), 0.5,
        ("on a cloudy day", "under a gray sky", "on an overcast day", "in gray weather"),
    ),
}  # fmt: skip

# Caption phrases for the time of day in indoor scenes.
INDOOR_PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("during the day", "in daylight", "on a bright day"),
    "night": ("at night", "late at night", "in the evening dark"),
}

# Places without a time of day have a fixed light.
INNER_LIGHTS: dict[str, Light] = {
    "underwater": Light(
        (0.10, 0.52, 0.78), (0.03, 0.30, 0.55), (0.8, 1.0, 1.0), (0.80, 0.94, 1.0), 0.5
    ),
    "space": Light(
        (0.02, 0.02, 0.07), (0.03, 0.03, 0.10), (1.0, 1.0, 0.95), (0.97, 0.97, 1.0), 0.5
    ),
    "moon": Light((0.01, 0.01, 0.03), (0.02, 0.02, 0.06), (1.0, 1.0, 0.95), (0.97, 0.97, 1.0), 0.5),
    "stage": Light((0.05, 0.02, 0.08), (0.08, 0.03, 0.10), (1.0, 1.0, 0.9), (1.0, 1.0, 1.0), 0.5),
}


def light_of(place: str, time_of_day: str | None) -> Light:
    """Return the light of a place at a time of day, or its fixed light if that is None."""
    return INNER_LIGHTS[place] if time_of_day is None else TIMES[time_of_day]
