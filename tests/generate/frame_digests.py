"""Digests of the frames of eleven requests and eleven edits, to compare two versions of the code.

Run `python tests/generate/frame_digests.py write FILE` before a change and `... check FILE` after
it, on the same machine: floating-point results differ between kinds of processors.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import skyloom
from skyloom.generate.receipt import weights_digest
from skyloom.generate.request import Request

_CAT = {"prompt": "a red car driving to the left on the beach", "seconds": 2, "seed": 11}
_SHIP = {"prompt": "a boat on the ocean at sunset", "seconds": 2, "seed": 12}
_REQUESTS: dict[str, dict[str, Any]] = {
    "source": {**_CAT, "seconds": 4},
    "second source": _SHIP,
    "one second": {"prompt": "a cat in the forest", "seconds": 1, "seed": 1},
    "best": {"prompt": "a penguin in the snow", "seed": 2, "quality": "best", "num_steps": 6},
    "rollout": {"prompt": "a rocket flying over the city", "seconds": 7, "seed": 3},
    "negative": {"prompt": "a blue bird", "negative_prompt": "night", "seed": 4, "num_steps": 5},
    "low rate": {"prompt": "a yellow balloon", "seconds": 3, "seed": 5, "fps": 8},
    "picture": {"prompt": "a boat", "seconds": 3, "seed": 6, "image": "source.png"},
    "storyboard": {
        "prompt": "on a sunny day",
        "seconds": 5,
        "seed": 7,
        "cards": [
            {"at": 0, "prompt": "a cat walking to the right"},
            {"at": "1.8", "prompt": "a dog walking to the right", "morph": "0.7"},
            {"at": "3.45", "prompt": "a cow", "seed": 99},
        ],
    },
    "storyboard with media": {
        "prompt": "",
        "seconds": 6,
        "seed": 8,
        "cards": [
            {"at": 0, "prompt": "a boat", "image": "source.png", "strength": 0.4},
            {"at": "1.3", "prompt": "a car on the beach", "video": "source.mkv"},
            {"at": 4, "prompt": "a rocket", "cut": True, "image": "source.png"},
        ],
    },
    "retakes": {"prompt": "a whale in the ocean", "seconds": 5, "seed": 9, "retakes": 2},
}
_EDITS: dict[str, dict[str, Any]] = {
    "remix": {"edit": {"verb": "remix", "strength": 0.7}},
    "restyle": {"edit": {"verb": "restyle", "style": "at night", "strength": 0.5}},
    "retake": {"edit": {"verb": "retake", "start": "1", "stop": "1.8"}},
    "retake of all but the ends": {"edit": {"verb": "retake", "start": "0.5", "stop": "3.8"}},
    "retake of the beginning": {"edit": {"verb": "retake", "start": "0", "stop": "2.9"}},
    "inpaint": {"edit": {"verb": "inpaint", "region": "32,32,64,64", "feather": 4}},
    "extend": {"edit": {"verb": "extend", "seconds": "2.5"}},
    "extend backward": {"edit": {"verb": "extend", "seconds": "1.5", "backward": True}},
    "recut": {"edit": {"verb": "recut", "start": "1", "stop": "2", "seconds": "4"}},
    "loop": {"edit": {"verb": "loop", "start": "0.5", "stop": "2.5", "bridge": "1"}},
    "blend": {"edit": {"verb": "blend", "curve": "sample", "strength": 0.6}},
    "stitch": {"edit": {"verb": "stitch", "morph": "0.8"}},
}


class _Critic:
    """Rejects every take whose frames are darker than the first window's."""

    bounds: Mapping[str, float] = {"light": 1.0}

    def __call__(self, frames: Any, first: Any, before: Any) -> Any:
        """Score a window by its mean light."""
        light = 0.0 if first is None else float(first.float().mean() / frames.float().mean())
        return _score()(round(light, 4), {"light": light})


def _score() -> Any:
    """The class of a critic's result, wherever this version of the code has it."""
    try:
        from skyloom.generate.sampling import WindowScore
    except ImportError:
        from skyloom.generate.sampling import WindowScore
    return WindowScore


def digests() -> Iterator[tuple[str, str]]:
    """Yield the name and the digest of every video. Sources are files in the working folder.

    Names are relative and files are not written twice, because the watermark depends on the
    receipt, which holds the names and digests of the sources.
    """
    pipeline = skyloom.load(device="cpu")
    digest = weights_digest(pipeline.info.manifest["files"])
    yield "weights", digest
    for name, fields in _REQUESTS.items():
        critic = _Critic() if "retakes" in fields else None
        video = pipeline.generate(Request.from_dict(fields), critic=critic)
        if "source" in name and not Path(f"{name}.mkv").exists():
            video.save(Path(f"{name}.mkv"))
        if name == "source":
            from PIL import Image

            Image.fromarray(video.frames[20].numpy()).save("source.png")
        yield name, str(video.receipt["frames"]["sha256"])
    for name, fields in _EDITS.items():
        videos = ["source.mkv"]
        if fields["edit"]["verb"] in ("blend", "stitch"):
            videos.append("second source.mkv")
        edit = {**fields["edit"], "videos": videos}
        request = {"prompt": "a green train in the desert", "seed": 21, "edit": edit}
        yield name, str(pipeline.generate(Request.from_dict(request)).receipt["frames"]["sha256"])


def main(mode: str, file: Path) -> int:
    """Write the digests to a file, or compare with it; return the exit code."""
    expected = json.loads(file.read_text())["frames"] if mode == "check" else {}
    file = file.absolute()
    found: dict[str, str] = {}
    media = file.with_suffix(".media")
    media.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKYLOOM_CACHE"] = folder
        os.chdir(media)
        for name, digest in digests():
            found[name] = digest
            verdict = "" if mode == "write" else expected.get(name) == digest
            print(f"{name:28} {digest[:16]} {verdict}", flush=True)  # noqa: T201
    if mode == "write":
        values = {"torch": torch.__version__, "machine": platform.machine(), "frames": found}
        file.write_text(json.dumps(values, indent=1) + "\n")
    return int(mode == "check" and found != expected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
