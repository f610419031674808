"""Sprite atlas, built from npm packages pinned by name, version and integrity.

An atlas folder holds `atlas.safetensors` (one WebP strip of square pictures per noun),
`ledger.json` (a row per sprite: package, version, integrity, file, sha256, licence, upstream) and
`ledger.sha256`. The files are not committed; only rendering training clips needs them. Pillow is
imported inside functions, because the built-in shapes work without it.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from diorama.world.nouns import NOUNS, Noun
from skyloom.core.errors import ConfigError

SIZE = 96  # sprite side in pixels
LOOP_FRAMES = 24  # 3 s at 8 frames per second
ATLAS_FILE = "atlas.safetensors"
LEDGER_FILE = "ledger.json"
LEDGER_DIGEST_FILE = "ledger.sha256"
_WEBP_QUALITY = 90
_CACHED_LOOPS = 160  # decoded loops in memory; one takes 0.9 MB
_OPAQUE_ALPHA = 40  # alpha above which a pixel counts when the margins are trimmed


@dataclass(frozen=True)
class Package:
    """An npm package of Fluent emoji art, pinned by the registry's integrity hash."""

    name: str
    version: str
    integrity: str
    upstream: str
    animated: bool = True
    licence: str = "MIT"

    @property
    def file(self) -> str:
        """File name written by `npm pack`."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


_LOOPS = "https://github.com/microsoft/fluentui-emoji-animated"
_STILLS = "https://github.com/microsoft/fluentui-emoji"
PACKAGES = (
    Package(
        "@lobehub/fluent-emoji-anim-1",
        "1.0.0",
        "sha512-/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
        _LOOPS,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-2",
        "1.0.0",
        "sha512-S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
        _LOOPS,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-3",
        "1.0.0",
        "sha512-UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
        _LOOPS,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-4",
        "1.0.0",
        "sha512-IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        _LOOPS,
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        _STILLS,
        animated=False,
    ),
)


class Atlas:
    """Sprites by noun key, decoded on first use. `digest` is a sha256 over keys and bytes."""

    size = SIZE

    def __init__(self, nouns: Mapping[str, Noun], strips: Mapping[str, np.ndarray]) -> None:
        self.nouns = dict(nouns)
        self.digest = _digest(strips)
        self._strips = strips
        self._decode = lru_cache(maxsize=_CACHED_LOOPS)(self._read)

    def __len__(self) -> int:
        return len(self.nouns)

    def frames(self, key: str) -> UInt8[Tensor, "n s s 4"]:
        """Return a noun's loop (8 frames per second) or single picture.

        RGBA with straight alpha; the tensor is cached and must not be modified. Raises ConfigError.
        """
        if key not in self.nouns:
            raise ConfigError(
                f"The atlas has no sprite for {key!r}.", hint="Run `diorama world assets` again."
            )
        return self._decode(key)

    def _read(self, key: str) -> UInt8[Tensor, "n s s 4"]:
        strip = self._strips[key]
        pixels = (
            rearrange(_decode_webp(strip.tobytes()), "(n s) w c -> n s w c", s=SIZE)
            if strip.ndim == 1
            else strip
        )
        return torch.from_numpy(pixels)


def load_atlas(folder: Path) -> Atlas:
    """Read an atlas. Raises ConfigError if the file is missing or damaged."""
    path = folder / ATLAS_FILE
    try:
        strips = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is not an atlas ({error}).", hint="Run `diorama world assets`."
        ) from error
    return Atlas({key: noun for key, noun in NOUNS.items() if key in strips}, strips)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Read the ledger of an atlas: one row per sprite."""
    return json.loads((folder / LEDGER_FILE).read_text(encoding="utf-8"))


def ledger_digest(folder: Path) -> str:
    """Compute the sha256 of an atlas's ledger, which checkpoints record for their training art."""
    return hashlib.sha256((folder / LEDGER_FILE).read_bytes()).hexdigest()


def fetch_packages(folder: Path, packages: Sequence[Package] = PACKAGES) -> list[Path]:
    """Download the packages missing from `folder` (0.75 GB) and check the integrity of all.

    Raises ConfigError if npm is missing or fails, or if a file has another sha512.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for package in packages:
        path = folder / package.file
        if not path.exists():
            _pack(package, folder)
        check_integrity(path, package)
        paths.append(path)
    return paths


def check_integrity(path: Path, package: Package) -> None:
    """Compare a file's sha512 with the package's integrity. Raises ConfigError on a mismatch."""
    try:
        with path.open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}).", hint="Run `diorama world assets`."
        ) from error
    if f"sha512-{found}" != package.integrity:
        raise ConfigError(
            f"{path} is not {package.name} {package.version}: its sha512 differs.",
            hint="Delete the file and run the command again.",
        )


def _pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            "Downloading the art needs npm, which was not found.",
            hint="Install Node.js. Generating videos does not need it.",
        )
    command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise ConfigError(
            f"npm could not download {package.name} {package.version}: {reason}.",
            hint="Check the network and run the command again.",
        )


def build_atlas(
    folder: Path,
    packages_folder: Path,
    nouns: Mapping[str, Noun] = NOUNS,
    packages: Sequence[Package] = PACKAGES,
) -> Atlas:
    """Extract the art of every noun from the packages; write the atlas and its ledger.

    Raises ConfigError if a package differs from the pinned one (checked before reading it) or if
    the art of a noun is missing.
    """
    strips: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for package in packages:
        path = packages_folder / package.file
        check_integrity(path, package)
        wanted = {
            name: noun
            for noun in nouns.values()
            if noun.animated == package.animated
            for name in _file_names(noun.emoji)
        }
        for member, content in _pictures(path, wanted):
            noun = wanted[Path(member).name]
            if noun.key in strips:
                continue
            frames, box = cut_sprite(content)
            if noun.animated and len(frames) == 1:
                continue  # the packages of loops also contain stills
            strips[noun.key] = _encode(frames)
            rows.append(_ledger_row(noun, package, member, content, box) | {"frames": len(frames)})
    missing = sorted(set(nouns) - set(strips))
    if missing:
        raise ConfigError(
            f"The packages have no art for {', '.join(missing)}.",
            hint="Check their emoji codes in nouns.toml.",
        )
    _write(folder, {key: strips[key] for key in nouns}, sorted(rows, key=lambda row: row["key"]))
    return Atlas(nouns, strips)


def _ledger_row(
    noun: Noun, package: Package, member: str, content: bytes, box: tuple[int, int, int, int]
) -> dict[str, Any]:
    return {
        "key": noun.key,
        "names": noun.names,
        "package": package.name,
        "version": package.version,
        "integrity": package.integrity,
        "file": member,
        "sha256": hashlib.sha256(content).hexdigest(),
        "licence": package.licence,
        "copyright": "Microsoft Corporation",
        "upstream": package.upstream,
        "box": box,
    }


def _write(folder: Path, strips: Mapping[str, np.ndarray], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{ATLAS_FILE}.part"
    save_file(dict(strips), unfinished)
    unfinished.replace(folder / ATLAS_FILE)
    (folder / LEDGER_FILE).write_text(
        json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / LEDGER_DIGEST_FILE).write_text(ledger_digest(folder) + "\n")


def _file_names(emoji: str) -> set[str]:
    plain = emoji.replace("-fe0f", "")
    return {f"{code}.webp" for code in (emoji, plain, f"{plain}-fe0f")}


def _pictures(path: Path, wanted: Mapping[str, Noun]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if Path(member.name).name in wanted else None
            if file is not None:
                yield member.name, file.read()


def cut_sprite(content: bytes) -> tuple[UInt8[np.ndarray, "n s s 4"], tuple[int, int, int, int]]:
    """Decode art into square frames; return them and the crop box (left, top, right, bottom).

    The lowest opaque row of any frame becomes the lower edge.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        count = getattr(image, "n_frames", 1)
        pictures = []
        for index in (
            [round(i * count / LOOP_FRAMES) for i in range(LOOP_FRAMES)] if count > 1 else [0]
        ):
            image.seek(index)
            pictures.append(image.convert("RGBA"))
    solid = np.max([np.asarray(picture)[:, :, 3] for picture in pictures], axis=0) > _OPAQUE_ALPHA
    rows = np.flatnonzero(solid.any(1))
    columns = np.flatnonzero(solid.any(0))
    top = int(rows[0])
    bottom = int(rows[-1]) + 1
    left = int(columns[0])
    right = int(columns[-1]) + 1
    side = max(bottom - top, right - left)
    start = (left + right) // 2 - side // 2
    box = (start, bottom - side, start + side, bottom)
    resized = [
        picture.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for picture in pictures
    ]
    return np.stack([np.asarray(picture) for picture in resized]), box


def _encode(frames: UInt8[np.ndarray, "n s s 4"]) -> UInt8[np.ndarray, " bytes"]:
    from PIL import Image

    visible = np.where(frames[..., 3:] > 0, frames, 0).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(rearrange(visible, "n h w c -> (n h) w c")).save(
        out, "WEBP", quality=_WEBP_QUALITY, method=4
    )
    return np.frombuffer(out.getvalue(), np.uint8)


def _decode_webp(content: bytes) -> UInt8[np.ndarray, "h w 4"]:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGBA"))


def _digest(strips: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for key in sorted(strips):
        total.update(key.encode() + b"\0" + strips[key].tobytes())
    return total.hexdigest()


def builtin_atlas() -> Atlas:
    """Draw an atlas of eight simple shapes, for tests and machines without the downloaded art."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    x = (columns + 0.5) / SIZE * 2 - 1
    y = 1 - (rows + 0.5) / SIZE * 2
    nouns: dict[str, Noun] = {}
    strips: dict[str, np.ndarray] = {}
    for key, (kind, layers) in _draw_shapes(x, y).items():
        paint = np.zeros((SIZE, SIZE, 3))
        alpha = np.zeros((SIZE, SIZE, 1))
        for distance, colour in layers:
            cover = np.clip(0.5 - distance * SIZE / 2, 0, 1)[..., None]
            # The lowest layer's colour extends beyond its edge, which avoids a dark rim.
            over = cover if alpha.any() else 1
            paint = paint * (1 - over) + np.array(colour) * over
            alpha = np.maximum(alpha, cover)
        shaded = np.clip(paint * (0.88 + 0.18 * y[..., None]), 0, 255)
        strips[key] = np.concatenate([shaded, alpha * 255], -1).round().astype(np.uint8)[None]
        nouns[key] = Noun(
            key, (key,), kind, "", facing="none" if kind in ("ball", "object") else "left"
        )
    return Atlas(nouns, strips)


_Plane = np.ndarray
_Layers = list[tuple[_Plane, tuple[int, int, int]]]


def _draw_shapes(x: _Plane, y: _Plane) -> dict[str, tuple[str, _Layers]]:
    """Return the kind and layers of every shape, from the lowest layer to the highest.

    A layer is a signed distance field and an RGB colour; x (right) and y (up) run from -1 to 1.
    """

    def circle(at_x: float, at_y: float, radius: float, flat: float = 1.0) -> _Plane:
        return np.hypot(x - at_x, (y - at_y) * flat) - radius

    def box(at_x: float, at_y: float, half_x: float, half_y: float) -> _Plane:
        return np.maximum(abs(x - at_x) - half_x, abs(y - at_y) - half_y)

    ball = circle(0.0, 0.0, 0.97)
    cube = box(0.0, 0.0, 0.85, 0.85)
    star = np.hypot(x, y) - 0.65 - 0.3 * np.cos(5 * (np.arctan2(y, x) - np.pi / 2))
    hull = np.maximum(abs(x) - 0.85 - 0.35 * (y + 0.5), abs(y + 0.68) - 0.3)
    sail = np.maximum(np.maximum(-0.42 - y, y + 1.5 * abs(x + 0.05) - 0.95), x - 0.05)
    body = circle(-0.2, 0.0, 0.7, 1.6)
    tail = np.maximum(abs(y) - 0.8 * (x - 0.1), x - 0.95)
    breast = np.minimum(circle(-0.1, -0.15, 0.62, 1.9), circle(-0.6, 0.1, 0.3))
    wing = np.maximum(abs(x - 0.15) - 0.75 * (0.9 - y) * 0.5, abs(y - 0.4) - 0.45)
    wheels = np.minimum(circle(-0.5, -0.7, 0.28), circle(0.5, -0.7, 0.28))
    dark = (40, 40, 60)
    white = (240, 240, 240)
    return {
        "ball": ("ball", [(ball, (230, 80, 60)), (np.maximum(ball, abs(y) - 0.2), white)]),
        "cube": ("object", [(cube, (80, 120, 230)), (cube + 0.35, (120, 160, 250))]),
        "star": ("object", [(star, (250, 205, 60))]),
        "ring": ("object", [(abs(np.hypot(x, y) - 0.7) - 0.24, (90, 190, 110))]),
        "boat": ("boat", [(np.minimum(hull, sail), (170, 100, 60)), (sail, (250, 220, 120))]),
        "fish": (
            "swimmer",
            [(np.minimum(body, tail), (60, 170, 220)), (circle(-0.55, 0.12, 0.08), dark)],
        ),
        "bird": (
            "flyer",
            [
                (np.minimum(breast, wing), (150, 90, 200)),
                (np.maximum(-x - 0.98 + 2 * abs(y - 0.05), x + 0.82), (250, 170, 60)),
                (circle(-0.66, 0.18, 0.07), dark),
            ],
        ),
        "wagon": (
            "car",
            [(np.minimum(box(0.0, -0.3, 0.95, 0.35), wheels), (210, 60, 120)), (wheels, dark),
             (box(-0.6, -0.1, 0.2, 0.1), white)],
        ),
    }  # fmt: skip
