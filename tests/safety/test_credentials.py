"""C2PA manifests: written and read in every format, invalid after any change."""

import random
import subprocess
import sys
from pathlib import Path

import c2pa
import pytest

from skyloom.core.errors import MediaError, RequestError
from skyloom.media.source import open_source
from skyloom.media.write import write_picture, write_video
from skyloom.safety.credentials import Ingredient, generation_assertion, read, sidecar_of, sign
from skyloom.safety.signer import find_signer, local_signer

GENERATION = {"model": "diorama", "seed": 7}
RECEIPT = {
    "skyloom": "0.1.0",
    "model": "diorama",
    "weights": "ab",
    "request": {"prompt": "a secret wish", "seed": 7, "size": "128x128"},
    "frames": {"sha256": "cd"},
}


@pytest.fixture
def write(scene, tmp_path):
    """Return a function that writes a file by name."""

    def written(name: str):
        frames = scene(1, count=6, side=64)
        if name.endswith(".png"):
            return write_picture(frames[0], tmp_path / name)
        return write_video(frames, 16, tmp_path / name, RECEIPT)

    return written


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.webm"])
def test_signed_files_are_read_back(write, name):
    path = write(name)
    assert read(path) is None
    where = sign(path, GENERATION, find_signer())
    found = read(path)
    assert found is not None
    assert where == (sidecar_of(path) if name == "a.webm" else path)
    assert (found.state, found.sidecar) == ("trusted", name == "a.webm")
    assert (found.actions, found.source_type) == (("c2pa.created",), "trainedAlgorithmicMedia")
    assert (found.generation, found.issuer, found.problems) == (GENERATION, "skyloom", ())
    assert where.stat().st_size < path.stat().st_size + 20_000


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_media_type_is_sniffed(write, name):
    path = write(name)
    sign(path, GENERATION, find_signer())
    content = bytearray(path.read_bytes())
    other = path.with_suffix(".bin")
    other.write_bytes(content)
    assert read(other).state == "trusted"
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    assert read(other).state == "invalid"


def test_receipt_is_kept_and_c2pa_validates(write):
    path = write("a.mp4")
    sign(path, GENERATION, find_signer())
    assert open_source(path).receipt == RECEIPT
    with path.open("rb") as file, c2pa.Reader("video/mp4", file) as reader:
        assert reader.get_validation_state() == "Valid"


def test_signer_of_another_machine_is_untrusted(write, tmp_path):
    path = write("a.mp4")
    sign(path, GENERATION, local_signer(tmp_path / "elsewhere"))
    find_signer()
    found = read(path)
    assert found is not None
    assert (found.state, found.problems) == ("untrusted", ("signingCredential.untrusted",))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.webm"])
def test_flipped_bits_invalidate_the_manifest(write, name):
    path = write(name)
    sign(path, GENERATION, find_signer())
    whole, content = read(path), path.read_bytes()
    manifest = range(
        content.find(b"jumdc2pa"),
        content.find(b"jumdc2pa") + 3_500 if b"jumdc2pa" in content else 0,
    )
    dice = random.Random(name)
    for place in [
        *dice.sample(range(64, len(content)), 12),
        *dice.sample(manifest, min(6, len(manifest))),
    ]:
        changed = bytearray(content)
        changed[place] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        found = read(path)
        harmless = place in manifest and found == whole  # padding of the manifest is not hashed
        assert harmless or (found is not None and found.state == "invalid"), place


def test_edit_lists_its_ingredients(write):
    parent, picture = write("parent.mp4"), write("stone.png")
    sign(parent, {"seed": 1}, find_signer())
    path = write("edited.gif")
    sign(
        path,
        GENERATION,
        find_signer(),
        sources=[Ingredient(parent, edited=True), Ingredient(picture)],
        verb="inpaint",
    )
    found = read(path)
    assert found is not None
    assert (found.state, found.parents) == ("trusted", ("parent.mp4", "stone.png"))
    assert found.actions == ("c2pa.opened", "c2pa.edited", "c2pa.placed")
    assert found.source_type == "compositeWithTrainedAlgorithmicMedia"


def test_assertion_has_no_prompt_by_default():
    assert generation_assertion(RECEIPT) == {
        "version": "0.1.0",
        "model": "diorama",
        "weights": "ab",
        "seed": 7,
        "size": "128x128",
        "frames": "cd",
    }
    assert generation_assertion(RECEIPT, with_prompt=True)["prompt"] == "a secret wish"


def test_failed_signing_leaves_the_file(write, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(MediaError, match="cannot be signed"):
        sign(path, GENERATION, find_signer())
    assert path.read_text() == "no video"
    parent = write("a.mp4")
    with pytest.raises(RequestError, match="At most one source"):
        sign(parent, GENERATION, find_signer(), sources=[Ingredient(parent, edited=True)] * 2)
    with pytest.raises(MediaError, match="cannot be read"):
        sign(parent, GENERATION, find_signer(), sources=[Ingredient(tmp_path / "gone.mp4")])
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".skyloom")]


def test_missing_file_and_invalid_sidecar(write, tmp_path):
    with pytest.raises(MediaError, match="cannot be read"):
        read(tmp_path / "none.mp4")
    path = write("a.webm")
    sidecar_of(path).write_bytes(b"no manifest")
    found = read(path)
    assert found is not None
    assert found.state == "invalid"


SIGN_LARGE_FILE = """
import sys
from pathlib import Path
from skyloom.safety.credentials import sign
from skyloom.safety.signer import local_signer

def peak():
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("VmHWM")).split()[1])

small, large = map(Path, sys.argv[1:])
signer = local_signer(small.parent / "signer")
sign(small, {}, signer)
before = peak()
sign(large, {}, signer)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_of_signing_does_not_grow_with_the_file(write):
    paths = [write("small.mp4"), write("large.mp4")]
    size = 192 * 2**20
    with paths[1].open("ab") as file:  # a box that players skip
        file.write(size.to_bytes(4) + b"free")
        file.write(bytes(size - 8))
    ran = subprocess.run(
        [sys.executable, "-c", SIGN_LARGE_FILE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) < 96 * 1024  # KiB
    assert read(paths[1]) is not None
