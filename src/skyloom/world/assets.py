"""The atlas: sprites fetched from npm packages by name, version and integrity, each with a licence on record.

An atlas folder holds `atlas.safetensors` (one WebP image strip per noun) and `ledger.json` (a row per sprite:
package, version, integrity, file, sha256, licence, upstream). Nothing of it is ever committed.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from skyloom.core.errors import ConfigError
from skyloom.world.nouns import NOUNS, Noun

SIZE, LOOP_FRAMES = 96, 24
ATLAS_FILE, LEDGER_FILE = "atlas.safetensors", "ledger.json"
_QUALITY = 90


@dataclass(frozen=True)
class Package:
    """An npm package of Fluent emoji art, pinned by what the registry said of its file."""

    name: str
    version: str
    integrity: str
    upstream: str

    @property
    def file(self) -> str:
        """The name `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


_ANIMATED = "microsoft/fluentui-emoji-animated (MIT)"
PACKAGES = (
    Package(
        "@lobehub/fluent-emoji-anim-1",
        "1.0.0",
        "sha512-/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
        _ANIMATED,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-2",
        "1.0.0",
        "sha512-S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
        _ANIMATED,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-3",
        "1.0.0",
        "sha512-UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
        _ANIMATED,
    ),
    Package(
        "@lobehub/fluent-emoji-anim-4",
        "1.0.0",
        "sha512-IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        _ANIMATED,
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "microsoft/fluentui-emoji (MIT)",
    ),
)


class Atlas:
    """Sprites by noun key, decoded when first asked for."""

    def __init__(self, nouns: Mapping[str, Noun], strips: Mapping[str, np.ndarray], digest: str) -> None:
        self.nouns = dict(nouns)
        self.digest = digest
        self._strips = strips
        self._decode = lru_cache(maxsize=None)(self._read)

    def __len__(self) -> int:
        return len(self.nouns)

    def frames(self, key: str) -> UInt8[Tensor, "n s s 4"]:
        """A noun's loop (8 frames a second) or its single picture, RGBA with straight alpha."""
        if key not in self._strips:
            raise ConfigError(f"The atlas has no {key!r}.", hint="Run `skyloom world assets` again.")
        return self._decode(key)

    def _read(self, key: str) -> UInt8[Tensor, "n s s 4"]:
        strip = self._strips[key]
        if strip.ndim == 4:  # noqa: PLR2004 - already frames
            return torch.from_numpy(strip)
        with Image.open(io.BytesIO(strip.tobytes())) as image:
            pixels = np.array(image.convert("RGBA"))
        side = pixels.shape[1]
        return torch.from_numpy(pixels.reshape(-1, side, side, 4))


def load_atlas(folder: Path) -> Atlas:
    """Read an atlas. Raises ConfigError when the folder has none or it is damaged."""
    path = folder / ATLAS_FILE
    try:
        strips = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is not an atlas ({error}).", hint="Run `skyloom world assets`.") from error
    return Atlas({key: NOUNS[key] for key in strips if key in NOUNS}, strips, _digest(strips))


def fetch_packages(folder: Path) -> list[Path]:
    """Fetch the packages that are not in `folder` yet, and check every file against its integrity."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for package in PACKAGES:
        path = folder / package.file
        if not path.exists():
            _pack(package, folder)
        check_integrity(path, package)
        paths.append(path)
    return paths


def check_integrity(path: Path, package: Package) -> None:
    """Raise ConfigError unless the file is the one that was pinned."""
    with path.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if f"sha512-{found}" != package.integrity:
        raise ConfigError(
            f"{path} is not {package.name} {package.version}: its sha512 differs.", hint="Delete it and try again."
        )


def _pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError("npm is needed to fetch the art.", hint="Install Node.js; generating needs none of it.")
    command = [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"npm could not fetch {package.name} {package.version}: {reason}")


def build_atlas(
    folder: Path,
    packages_folder: Path,
    nouns: Mapping[str, Noun] = NOUNS,
    packages: tuple[Package, ...] = PACKAGES,
) -> Atlas:
    """Cut every noun's art out of the packages into an atlas with a ledger; animated art is preferred."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: noun for noun in nouns.values() for name in _file_names(noun.emoji)}
    strips: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for package in packages:
        for name, content in _pictures(packages_folder / package.file, wanted):
            noun = wanted[name]
            if noun.key in strips:
                continue
            frames, box = cut_sprite(content)
            strips[noun.key] = _encode(frames)
            rows.append(
                {
                    "key": noun.key,
                    "names": noun.names,
                    **asdict(package),
                    "licence": "MIT",
                    "file": name,
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "frames": len(frames),
                    "box": box,
                }
            )
    missing = sorted(set(nouns) - set(strips))
    if missing:
        raise ConfigError(f"No art for {', '.join(missing)}.", hint="Check the emoji codes in nouns.toml.")
    save_file(strips, folder / ATLAS_FILE)
    ledger = json.dumps(sorted(rows, key=lambda row: row["key"]), indent=1)
    (folder / LEDGER_FILE).write_text(ledger + "\n")
    (folder / "ledger.sha256").write_text(hashlib.sha256(ledger.encode()).hexdigest() + "\n")
    return load_atlas(folder)


def _file_names(emoji: str) -> set[str]:
    plain = emoji.replace("-fe0f", "")
    return {f"{code}.webp" for code in (emoji, plain, f"{plain}-fe0f")}


def _pictures(path: Path, wanted: Mapping[str, Noun]) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        found = []
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            file = archive.extractfile(member) if name in wanted else None
            if file is not None:
                found.append((name, file.read()))
    return found


def cut_sprite(content: bytes) -> tuple[UInt8[np.ndarray, "n s s 4"], tuple[int, int, int, int]]:
    """Art as a loop of square frames: one box round all of them, the lowest solid row on the lower edge."""
    with Image.open(io.BytesIO(content)) as image:
        count = getattr(image, "n_frames", 1)
        picked = [round(i * count / LOOP_FRAMES) for i in range(LOOP_FRAMES)] if count > 1 else [0]
        pictures = []
        for index in picked:
            image.seek(index)
            pictures.append(image.convert("RGBA"))
    solid = np.max([np.asarray(picture)[:, :, 3] for picture in pictures], axis=0) > 40  # noqa: PLR2004
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = max(bottom - top, right - left)
    middle = (left + right) // 2
    box = (middle - side // 2, bottom - side, middle - side // 2 + side, bottom)
    resized = [picture.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in resized]), box


def _encode(frames: UInt8[np.ndarray, "n s s 4"]) -> UInt8[np.ndarray, " bytes"]:
    clean = np.where(frames[..., 3:] > 0, frames, 0).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(clean.reshape(-1, frames.shape[2], 4)).save(out, "WEBP", quality=_QUALITY, method=4)
    return np.frombuffer(out.getvalue(), np.uint8)


def _digest(strips: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for key in sorted(strips):
        total.update(key.encode() + b"\0" + strips[key].tobytes())
    return total.hexdigest()


def builtin_atlas() -> Atlas:
    """Eight shapes that we draw ourselves, for tests and for machines without the art."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    x, y = (x + 0.5) / SIZE * 2 - 1, 1 - (y + 0.5) / SIZE * 2
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    shapes = {
        "ball": ("ball", "none", radius - 0.95, (230, 80, 60)),
        "cube": ("object", "none", np.maximum(abs(x), abs(y)) - 0.85, (80, 120, 230)),
        "star": ("object", "none", radius - 0.65 - 0.3 * np.cos(5 * (angle - np.pi / 2)), (250, 205, 60)),
        "ring": ("object", "none", abs(radius - 0.7) - 0.24, (90, 190, 110)),
        "boat": ("boat", "left", np.maximum(abs(x) - 0.95 - 0.3 * (y + 0.5), abs(y + 0.55) - 0.4), (170, 100, 60)),
        "fish": ("swimmer", "left", np.minimum(np.hypot(x + 0.2, 1.6 * y) - 0.7, np.maximum(abs(y) - x, x - 0.9)), (60, 170, 220)),
        "bird": ("flyer", "left", np.minimum(np.hypot(x + 0.2, 1.9 * y) - 0.7, np.maximum(x - 0.95, abs(y) - x + 0.1)), (150, 90, 200)),
        "wagon": ("car", "left", np.minimum(np.maximum(abs(x) - 0.95, abs(y + 0.2) - 0.3), np.hypot(abs(x) - 0.5, y + 0.65) - 0.33), (210, 60, 120)),
    }  # fmt: skip
    nouns, strips = {}, {}
    for key, (kind, facing, distance, colour) in shapes.items():
        alpha = np.clip(0.5 - distance * SIZE / 2, 0, 1)
        shade = np.clip(0.85 + 0.25 * y, 0, 1.1)[..., None] * np.array(colour)
        strips[key] = np.concatenate([np.clip(shade, 0, 255), alpha[..., None] * 255], -1).astype(np.uint8)[None]
        nouns[key] = Noun(key, (key,), kind, "", facing=facing, animated=False)
    return Atlas(nouns, strips, _digest(strips))
