"""Atlas: art matches the pinned packages, every sprite has a ledger row, built-in shapes."""

import base64
import hashlib
import io
import os
import stat
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diorama.world.assets import (
    LEDGER_FILE,
    LOOP_FRAMES,
    PACKAGES,
    SIZE,
    Package,
    build_atlas,
    builtin_atlas,
    fetch_packages,
    ledger_digest,
    load_atlas,
    read_ledger,
)
from diorama.world.nouns import NOUNS
from skyloom.core.errors import ConfigError

Image = pytest.importorskip("PIL.Image")

REPOSITORY_ATLAS = Path(__file__).parents[4] / ".atlas"
LOOPED, STILL = NOUNS["cat"], NOUNS["balloon"]


def picture(shift: int = 0, side: int = 64, colour: tuple[int, int, int] = (200, 40, 40)):
    """A block 20 wide and 30 high whose lower edge is at row 50, moved right by `shift`."""
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[20:50, 10 + shift : 30 + shift] = (*colour, 255)
    return Image.fromarray(pixels)


def webp(*pictures) -> bytes:
    out = io.BytesIO()
    pictures[0].save(
        out,
        "WEBP",
        lossless=True,
        save_all=len(pictures) > 1,
        append_images=pictures[1:],
        duration=42,
    )
    return out.getvalue()


def pack(folder: Path, name: str, animated: bool, members: dict[str, bytes]) -> Package:
    """A package as npm would give it, pinned by its true integrity."""
    package = Package(f"@test/{name}", "1.0.0", "", "https://example.com/art", animated)
    path = folder / package.file
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(f"package/assets/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return replace(package, integrity=f"sha512-{digest}")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Package, ...]]:
    folder = tmp_path_factory.mktemp("packages")
    loop = webp(*(picture(shift) for shift in range(30)))
    loops = pack(
        folder,
        "loops",
        True,
        {
            f"{LOOPED.emoji}.webp": loop,
            f"{STILL.emoji}.webp": webp(picture()),
            "1f4a9.webp": b"not asked for",
        },
    )
    stills = pack(
        folder, "stills", False, {f"{STILL.emoji}-fe0f.webp": webp(picture(colour=(20, 90, 220)))}
    )
    return folder, (loops, stills)


WANTED = {LOOPED.key: LOOPED, STILL.key: STILL}


def test_an_atlas_is_built_saved_and_read_back(packed, tmp_path: Path) -> None:
    built = build_atlas(tmp_path, packed[0], WANTED, packed[1])
    read = load_atlas(tmp_path)
    assert set(read.nouns) == set(WANTED)
    assert read.digest == built.digest and len(built.digest) == 64
    assert read.frames(LOOPED.key).shape == (LOOP_FRAMES, SIZE, SIZE, 4)
    assert read.frames(STILL.key).shape == (1, SIZE, SIZE, 4)
    assert read.frames(STILL.key).dtype == torch.uint8 and read.size == SIZE
    assert torch.equal(read.frames(LOOPED.key), built.frames(LOOPED.key))


def test_stills_come_from_the_package_of_stills(packed, tmp_path: Path) -> None:
    atlas = build_atlas(tmp_path, packed[0], WANTED, packed[1])
    middle = atlas.frames(STILL.key)[0, SIZE // 2, SIZE // 2]
    assert middle[2] > 150 and middle[0] < 90


def test_one_square_box_for_all_frames_with_the_feet_at_the_bottom(packed, tmp_path: Path) -> None:
    atlas = build_atlas(tmp_path, packed[0], WANTED, packed[1])
    box = {row["key"]: row["box"] for row in read_ledger(tmp_path)}
    left, top, right, bottom = box[STILL.key]
    assert (top, bottom) == (20, 50) and right - left == 30
    left, top, right, bottom = box[LOOPED.key]
    assert bottom == 50 and right - left == bottom - top and (left, right) == (10, 59)
    alpha = atlas.frames(LOOPED.key)[..., 3]
    assert (alpha[:, -1] > 200).any(dim=1).all()
    columns = [int((frame > 128).any(0).nonzero().min()) for frame in alpha]
    assert columns == sorted(columns) and columns[-1] > columns[0] + 40


def test_the_ledger_has_a_row_per_sprite(packed, tmp_path: Path) -> None:
    build_atlas(tmp_path, packed[0], WANTED, packed[1])
    rows = {row["key"]: row for row in read_ledger(tmp_path)}
    assert set(rows) == set(WANTED)
    row = rows[LOOPED.key]
    assert (row["package"], row["version"], row["licence"]) == ("@test/loops", "1.0.0", "MIT")
    assert row["integrity"] == packed[1][0].integrity
    with tarfile.open(packed[0] / packed[1][0].file) as archive:
        assert hashlib.sha256(archive.extractfile(row["file"]).read()).hexdigest() == row["sha256"]
    assert (tmp_path / "ledger.sha256").read_text().strip() == ledger_digest(tmp_path)


def test_building_twice_gives_the_same_bytes(packed, tmp_path: Path) -> None:
    first = build_atlas(tmp_path / "a", packed[0], WANTED, packed[1])
    second = build_atlas(tmp_path / "b", packed[0], WANTED, packed[1])
    assert first.digest == second.digest
    assert (tmp_path / "a" / LEDGER_FILE).read_bytes() == (
        tmp_path / "b" / LEDGER_FILE
    ).read_bytes()


def test_a_package_that_was_tampered_with_is_refused(packed, tmp_path: Path) -> None:
    package = packed[1][0]
    bad = bytearray((packed[0] / package.file).read_bytes())
    bad[-1] ^= 1
    (tmp_path / package.file).write_bytes(bad)
    with pytest.raises(ConfigError, match="sha512 differs"):
        build_atlas(tmp_path / "atlas", tmp_path, WANTED, packed[1])
    assert not (tmp_path / "atlas").exists()


def test_missing_packages_art_and_atlases_raise_errors(packed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        build_atlas(tmp_path, tmp_path, WANTED, packed[1])
    with pytest.raises(ConfigError, match="no art for dog"):
        build_atlas(tmp_path, packed[0], WANTED | {"dog": NOUNS["dog"]}, packed[1])
    with pytest.raises(ConfigError, match="diorama world assets"):
        load_atlas(tmp_path / "nowhere")
    (tmp_path / "atlas.safetensors").write_bytes(b"no atlas")
    with pytest.raises(ConfigError, match="is not an atlas"):
        load_atlas(tmp_path)


def test_a_noun_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="'dog'"):
        builtin_atlas().frames("dog")


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!{sys.executable}\nimport pathlib, sys\n{script}\n")
    (folder / "npm").chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_fetching_packs_by_name_and_version_once(
    packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "assert sys.argv[1] == 'pack', sys.argv\n"
        "assert sys.argv[2] in ('@test/loops@1.0.0', '@test/stills@1.0.0'), sys.argv\n"
        "name = sys.argv[2][1:].replace('/', '-').replace('@', '-') + '.tgz'\n"
        f"content = (pathlib.Path({str(packed[0])!r}) / name).read_bytes()\n"
        "(pathlib.Path(sys.argv[4]) / name).write_bytes(content)"
    )
    fake_npm(tmp_path / "bin", script, monkeypatch)
    paths = fetch_packages(tmp_path / "out", packed[1])
    assert [path.read_bytes() for path in paths] == [
        (packed[0] / path.name).read_bytes() for path in paths
    ]
    fake_npm(tmp_path / "bin", "sys.exit('must not run again')", monkeypatch)
    assert fetch_packages(tmp_path / "out", packed[1]) == paths
    paths[0].write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="sha512 differs"):
        fetch_packages(tmp_path / "out", packed[1])


def test_npm_failures_raise_errors(packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", "sys.exit('404 not found')", monkeypatch)
    with pytest.raises(ConfigError, match=r"could not download @test/loops 1\.0\.0: 404 not found"):
        fetch_packages(tmp_path / "out", packed[1])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="needs npm"):
        fetch_packages(tmp_path / "out", packed[1])


def test_the_pinned_packages() -> None:
    assert PACKAGES[-1].file == "lobehub-fluent-emoji-3d-1.1.0.tgz"
    assert len({package.name for package in PACKAGES}) == 5
    for package in PACKAGES:
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"))) == 64
        assert package.licence == "MIT" and package.upstream.startswith(
            "https://github.com/microsoft/fluentui-emoji"
        )


def test_builtin_shapes_are_solid_smooth_and_clear_around() -> None:
    atlas = builtin_atlas()
    assert set(atlas.nouns) == {"ball", "cube", "star", "ring", "boat", "fish", "bird", "wagon"}
    for key, noun in atlas.nouns.items():
        frames = atlas.frames(key)
        alpha = frames[0, :, :, 3]
        assert frames.shape == (1, SIZE, SIZE, 4) and not noun.animated
        assert 0.15 < float((alpha == 255).float().mean()) < 0.9
        assert ((alpha > 0) & (alpha < 255)).sum() > 20, "edges are antialiased"
        assert alpha[0, 0] == 0 and alpha[0, -1] == 0
        edge = frames[0][(alpha > 0) & (alpha < 255)][:, :3].float().mean(0)
        assert edge.max() > 60, "straight alpha: no dark rim"


def test_builtin_shapes_face_left_and_differ() -> None:
    atlas = builtin_atlas()
    assert {key for key, noun in atlas.nouns.items() if noun.facing == "left"} == {
        "boat",
        "fish",
        "bird",
        "wagon",
    }
    dark = (atlas.frames("fish")[0, :, :, :3].sum(-1) < 200) & (
        atlas.frames("fish")[0, :, :, 3] > 200
    )
    assert float(dark.nonzero()[:, 1].float().mean()) < SIZE / 2, "the eye is on the left"
    assert len({atlas.frames(key).numpy().tobytes() for key in atlas.nouns}) == 8
    assert builtin_atlas().digest == atlas.digest


def test_builtin_atlas_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert builtin_atlas().frames("ball").shape == (1, SIZE, SIZE, 4)


@pytest.mark.skipif(not (REPOSITORY_ATLAS / LEDGER_FILE).exists(), reason="no atlas built")
def test_the_built_atlas_and_its_ledger_hold_every_noun() -> None:
    atlas = load_atlas(REPOSITORY_ATLAS)
    rows = {row["key"]: row for row in read_ledger(REPOSITORY_ATLAS)}
    assert set(rows) == set(atlas.nouns) == set(NOUNS)
    pinned = {
        (package.name, package.version, package.integrity, package.upstream) for package in PACKAGES
    }
    for key, row in rows.items():
        assert (row["package"], row["version"], row["integrity"], row["upstream"]) in pinned
        assert row["licence"] == "MIT" and len(row["sha256"]) == 64
        assert row["frames"] == (LOOP_FRAMES if NOUNS[key].animated else 1)
    assert atlas.frames("cat").shape == (LOOP_FRAMES, SIZE, SIZE, 4)
    assert (REPOSITORY_ATLAS / "atlas.safetensors").stat().st_size <= 20_000_000
