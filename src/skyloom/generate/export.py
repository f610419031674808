"""What happens to a finished file: a signed manifest, last of all, and a line in this machine's registry.

One place for the command line and the server. Frames are marked before that, in the pipeline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skyloom.safety.credentials import Ingredient, generation_assertion, sign
from skyloom.safety.provenance import ProvenanceRecord, Registry, content_sha256
from skyloom.safety.signer import find_signer
from skyloom.safety.watermark import watermark_id_of_receipt


def check_ready(*, credentials: bool = True) -> None:
    """Raise, before any work, if a file could not be signed or registered: MediaError or ConfigError."""
    if credentials:
        find_signer()
    Registry().prepare()


def publish(
    path: Path,
    receipt: Mapping[str, Any],
    *,
    looks: Sequence[str] = (),
    credentials: bool = True,
    told: bool = True,
    registry: Registry | None = None,
) -> None:
    """Sign a finished file (`credentials`) and register it, by its receipt (Receipt.to_dict).

    The manifest says how the file was made, or, where that is not to be `told`, only by which model; never the
    prompt. `looks` are those of a FrameHasher. Raises MediaError.
    """
    generation = generation_assertion(receipt)
    if credentials:
        said = (
            generation
            if told
            else {key: generation[key] for key in ("version", "model") if key in generation}
        )
        edit = (receipt.get("request") or {}).get("edit") or {}
        sign(path, said, find_signer(), sources=sources_of(receipt), verb=edit.get("verb"))
    frames = (receipt.get("frames") or {}).get("sha256", "")
    identity = watermark_id_of_receipt(receipt)
    making = ProvenanceRecord(
        path.name, content_sha256(path), frames, identity, generation, tuple(looks)
    )
    (registry or Registry()).add(making)


def sources_of(receipt: Mapping[str, Any]) -> list[Ingredient]:
    """The files, still there, that a video was made from: first picture, what cards pin, what it is an edit of."""
    asked = receipt.get("request") or {}
    named = [
        asked.get("image"),
        *(card.get(key) for card in asked.get("cards", []) for key in ("image", "video")),
    ]
    videos = dict.fromkeys((asked.get("edit") or {}).get("videos", []))
    alone = (
        len(videos) == 1
    )  # a manifest names one video that was edited; of several, all went into it
    there = [(name, False) for name in dict.fromkeys(named) if name] + [
        (name, alone) for name in videos
    ]
    return [Ingredient(Path(name), edited=edited) for name, edited in there if Path(name).is_file()]
