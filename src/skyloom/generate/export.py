# pyright: basic
"""The exporter: write a stream of steps to a video file, sign it (C2PA) and register it.

The command line, the server, replay and `Pipeline.export` use it. Watermarks are applied earlier,
by the output stage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from skyloom.generate.output import Step
from skyloom.generate.plan import Plan
from skyloom.media.write import VideoWriter, open_pipe, open_video
from skyloom.safety.credentials import Ingredient, generation_assertion, sign
from skyloom.safety.provenance import FrameHasher, ProvenanceRecord, Registry, content_sha256
from skyloom.safety.signer import find_signer
from skyloom.safety.watermark import watermark_id_of_receipt

Receipts = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class ExportOptions:
    """How a video is written.

    credentials: sign the file. embed_receipt: write the receipt into it; without it, the signed
    manifest names the model only. player: stream that gets the frames as well. annotate: add notes
    to the receipt. redact: the receipt that the file gets, made from the annotated one.
    """

    credentials: bool = True
    embed_receipt: bool = True
    player: BinaryIO | None = None
    annotate: Receipts = dict
    redact: Receipts = dict


def check_ready(*, credentials: bool = True) -> None:
    """Raise MediaError or ConfigError if a file could not be signed or registered."""
    if credentials:
        find_signer()
    Registry().prepare()


def export_steps(
    steps: Iterable[Step], plan: Plan, target: Path | None, options: ExportOptions | None = None
) -> Iterator[Step]:
    """Write the frames of a stream to `target` and pass its steps on.

    When the iterator ends, the file is in place, signed and registered. Frames and the sound of
    kept spans are written in constant memory. Without a target, only the player gets frames.
    The last step carries the annotated receipt. Raises MediaError.
    """
    options = options or ExportOptions()
    hasher = FrameHasher(plan.fps)
    receipt: Mapping[str, Any] | None = None
    with ExitStack() as stack:
        writer = None if target is None else stack.enter_context(open_video(target, plan.fps))
        player = None
        if options.player is not None:
            player = stack.enter_context(open_pipe(options.player, plan.fps))
        notice = None if writer is None else _add_sound(plan, writer)
        for made in steps:
            if made.audio is not None:  # before its frames
                for sound_sink in (writer, player):
                    if sound_sink is not None:
                        held = sound_sink.add_audio(made.audio.samples, made.audio.rate)
                        notice = notice or (None if held else _NO_SOUND)
            if made.frames is not None and len(made.frames):
                for sink in (writer, player, hasher):
                    if sink is not None:
                        sink.append(made.frames)
            step = made
            if notice is not None:
                step = replace(step, notice=" ".join(filter(None, (notice, step.notice))))
                notice = None
            if step.receipt is not None:
                receipt = options.annotate(step.receipt)
                step = replace(step, receipt=dict(receipt))
            yield step
        assert receipt is not None, "the last step of a stream has the receipt"
        if writer is not None and options.embed_receipt:
            writer.receipt = dict(options.redact(receipt))
    if target is not None:
        sign_and_register(
            target,
            receipt,
            perceptual_hashes=hasher.hashes,
            credentials=options.credentials,
            disclose=options.embed_receipt,
        )


_NO_SOUND = "The sound was dropped: the file's format holds none."


def _add_sound(plan: Plan, writer: VideoWriter) -> str | None:
    """Copy the sound of an edit's sources. Returns a notice if the file cannot hold all of it."""
    if plan.sources is None:
        return None
    lost = False
    for position, clip in plan.timeline.sound_clips:
        source = plan.sources.sources[clip.source]
        if source.has_sound:
            packets = source.sound_packets(clip.start, clip.stop)
            decoded = source.stream_audio(clip.start, clip.stop)
            lost |= not writer.add_sound(source.sound, packets, position, decoded=decoded)
    notices = ["Some sound was dropped: the file's format holds none."] if lost else []
    return " ".join([*notices, *(f"{notice.capitalize()}." for notice in writer.notices)]) or None


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
