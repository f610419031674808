# pyright: basic
"""Finish a written video file: sign it (C2PA) and register it in this machine's registry.

The command line and the server use it. Watermarks are applied earlier, by the pipeline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skyloom.safety.credentials import Ingredient, generation_assertion, sign
from skyloom.safety.provenance import ProvenanceRecord, Registry, content_sha256
from skyloom.safety.signer import find_signer
from skyloom.safety.watermark import watermark_id_of_receipt


def check_ready(*, credentials: bool = True) -> None:
    """Raise MediaError or ConfigError if a file could not be signed or registered."""
    if credentials:
        find_signer()
    Registry().prepare()


def sign_and_register(
    path: Path,
    receipt: Mapping[str, Any],
    *,
    perceptual_hashes: Sequence[str] = (),
    credentials: bool = True,
    disclose: bool = True,
    registry: Registry | None = None,
) -> None:
    """Sign a finished file, if `credentials`, and register it.

    `receipt` is Receipt.to_dict. The C2PA manifest holds the generation settings, without the
    prompt; without `disclose`, only the model. Raises MediaError.
    """
    generation = generation_assertion(receipt)
    if credentials:
        assertion = generation
        if not disclose:
            assertion = {key: generation[key] for key in ("version", "model") if key in generation}
        edit = (receipt.get("request") or {}).get("edit") or {}
        sign(path, assertion, find_signer(), sources=sources_of(receipt), verb=edit.get("verb"))
    frames = (receipt.get("frames") or {}).get("sha256", "")
    record = ProvenanceRecord(
        name=path.name,
        sha256=content_sha256(path),
        frames=frames,
        identity=watermark_id_of_receipt(receipt),
        generation=generation,
        hashes=tuple(perceptual_hashes),
    )
    (registry or Registry()).add(record)


def sources_of(receipt: Mapping[str, Any]) -> list[Ingredient]:
    """Existing files that a video was made from: first image, media of cards, edited videos."""
    request = receipt.get("request") or {}
    media = [request.get("image")]
    for card in request.get("cards", []):
        media += [card.get("image"), card.get("video")]
    videos = dict.fromkeys((request.get("edit") or {}).get("videos", []))
    # C2PA has one parent that was edited; several videos are ingredients
    edited = len(videos) == 1
    sources = [Ingredient(Path(name), edited=False) for name in dict.fromkeys(media) if name]
    sources += [Ingredient(Path(name), edited=edited) for name in videos]
    return [source for source in sources if source.path.is_file()]
