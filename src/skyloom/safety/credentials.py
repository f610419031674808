"""C2PA content credentials: a signed manifest in the file, or in a sidecar if the format has none.

A manifest states that a file was generated (or edited) by a model, by which, and from what; any
change of the file invalidates it. Files are signed last and offline: no time stamp, revocation list
or remote manifest. C2PA 2.2, https://c2pa.org; `skyloom.generation` is a custom assertion.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.files import SNIFF_BYTES, sniff
from skyloom.core.version import __version__
from skyloom.media.write import atomic_output
from skyloom.safety.signer import Signer, local_authority

if TYPE_CHECKING:
    from c2pa import Context

EMBEDDED = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".avi": "video/avi",
    ".gif": "image/gif",
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
}
SIDECAR = ".c2pa"
ASSERTION = "skyloom.generation"
MAX_SIDECAR = 16 * 2**20
_MEMORY_MIB = 32  # of a file that the C2PA library holds in memory at once
_MANIFEST_LABELS = (b"jumdc2pa", b"jumdc2ma", b"urn:c2pa")
_LABEL_SEARCH_BYTES = 2**20
_OCTET_STREAM = "application/octet-stream"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_GENERATED = "trainedAlgorithmicMedia"
_COMPOSITE = "compositeWithTrainedAlgorithmicMedia"
_ASSERTED_FIELDS = ("seed", "size", "seconds", "fps", "num_steps", "guidance_scale", "quality")


@dataclass(frozen=True)
class Ingredient:
    """A source file of a video; `edited` marks the one that was edited (C2PA: parentOf)."""

    path: Path
    edited: bool = False


@dataclass(frozen=True)
class Credentials:
    """Content of a manifest.

    `state` is "trusted" (intact, signed by this machine or a given authority), "untrusted" (intact,
    unknown signer) or "invalid" (file or manifest was changed; `problems` has the C2PA codes).
    """

    state: str
    issuer: str | None = None
    signer: str | None = None
    actions: tuple[str, ...] = ()
    source_type: str | None = None
    generation: Mapping[str, Any] | None = None
    parents: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    sidecar: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def generation_assertion(
    receipt: Mapping[str, Any], *, with_prompt: bool = False
) -> dict[str, Any]:
    """Return the assertion for a receipt (Receipt.to_dict), without the prompt by default."""
    request = receipt.get("request") or {}
    values = {
        "version": receipt.get("skyloom"),
        "model": receipt.get("model"),
        "weights": receipt.get("weights"),
        **{name: request.get(name) for name in _ASSERTED_FIELDS},
        "frames": (receipt.get("frames") or {}).get("sha256"),
    }
    if with_prompt:
        values["prompt"] = request.get("prompt")
        values["cards"] = [card.get("prompt") for card in request.get("cards", [])] or None
    return {name: value for name, value in values.items() if value is not None}


def sidecar_of(path: Path) -> Path:
    """Return the path of a manifest sidecar: `video.webm.c2pa`."""
    return path.with_name(path.name + SIDECAR)


def sign(
    path: Path,
    generation: Mapping[str, Any],
    signer: Signer,
    *,
    sources: Sequence[Ingredient] = (),
    verb: str | None = None,
) -> Path:
    """Sign a finished file, atomically; return the path of the manifest (the file or its sidecar).

    `verb` is the edit verb. Raises MediaError if a file cannot be read, written or signed.
    """
    from c2pa import Builder, C2paError, C2paSignerInfo, C2paSigningAlg
    from c2pa import Signer as C2paSigner

    kind = EMBEDDED.get(path.suffix.lower())
    target = path if kind else sidecar_of(path)
    try:
        info = C2paSignerInfo(
            C2paSigningAlg.ES256, signer.chain.encode(), signer.key.encode(), None
        )
        manifest = _manifest(path.name, generation, sources, verb)
        with (
            Builder(manifest, context=_context(())) as builder,
            C2paSigner.from_info(info) as c2pa_signer,
            atomic_output(target) as temporary,
        ):
            for index, source in enumerate(sources):
                _add_ingredient(builder, source, f"source-{index}")
            if not kind:
                builder.set_no_embed()
            with path.open("rb") as file, temporary.open("w+b") as signed:
                content = builder.sign(c2pa_signer, kind or _OCTET_STREAM, file, signed)
            if not kind:
                temporary.write_bytes(content)
    except C2paError as error:
        raise MediaError(
            f"{path} cannot be signed ({_cause(error)}).", hint="Use --no-credentials."
        ) from error
    return target


def read(path: Path, authorities: Sequence[str] | None = None) -> Credentials | None:
    """Read and validate the manifest in a file or its sidecar; None if there is none.

    `authorities` are trusted certificates (PEM), by default this machine's own. Raises MediaError
    for a file that cannot be opened.
    """
    if authorities is None:
        own = local_authority()
        authorities = () if own is None else (own,)
    sidecar = sidecar_of(path)
    try:
        with path.open("rb") as file:
            media_type = sniff(file.read(SNIFF_BYTES))
            file.seek(0)
            embedded = media_type in EMBEDDED.values()
            if media_type and embedded and (found := _read(file, media_type, None, authorities)):
                return found
            if not sidecar.is_file():
                return None
            if sidecar.stat().st_size > MAX_SIDECAR:
                return Credentials("invalid", problems=("the sidecar is too large",), sidecar=True)
            return _read(file, _OCTET_STREAM, sidecar.read_bytes(), authorities)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _manifest(
    title: str, generation: Mapping[str, Any], sources: Sequence[Ingredient], verb: str | None
) -> dict[str, Any]:
    """Return the manifest: actions and the generation assertion."""
    edited = [f"source-{index}" for index, source in enumerate(sources) if source.edited]
    others = [f"source-{index}" for index, source in enumerate(sources) if not source.edited]
    if len(edited) > 1:
        raise RequestError(
            f"At most one source may be edited, got {len(edited)}.",
            hint="Mark one source as edited.",
        )
    agent = {"name": "skyloom", "version": __version__}
    actions: list[dict[str, Any]] = []
    if edited:
        actions.append({"action": "c2pa.opened", "parameters": {"ingredientIds": edited}})
    actions.append(
        {
            "action": "c2pa.edited" if edited else "c2pa.created",
            "softwareAgent": agent,
            "digitalSourceType": _SOURCE_TYPE + (_COMPOSITE if sources else _GENERATED),
            **({"description": verb} if verb else {}),
        }
    )
    if others:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": others}})
    assertions = [
        {"label": "c2pa.actions.v2", "data": {"actions": actions}},
        {"label": ASSERTION, "data": generation},
    ]
    return {"claim_generator_info": [agent], "title": title, "assertions": assertions}


def _add_ingredient(builder: Any, source: Ingredient, name: str) -> None:
    """Add a source file as an ingredient, with its own manifest."""
    values = {
        "title": source.path.name,
        "relationship": "parentOf" if source.edited else "componentOf",
        "instance_id": name,
        "label": name,
    }
    media_type = EMBEDDED.get(source.path.suffix.lower(), _OCTET_STREAM)
    try:
        with source.path.open("rb") as file:
            builder.add_ingredient(values, media_type, file)
    except OSError as error:
        raise MediaError(
            f"{source.path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _read(
    file: BinaryIO, media_type: str, manifest: bytes | None, authorities: Sequence[str]
) -> Credentials | None:
    """Validate an embedded manifest, or that of a sidecar; None if the file has none."""
    from c2pa import C2paError, Reader

    sidecar = manifest is not None
    try:
        with Reader(media_type, file, manifest, context=_context(authorities)) as reader:
            report = json.loads(reader.json())
            return _credentials(report, reader.get_validation_state(), sidecar=sidecar)
    except (C2paError, ValueError) as error:  # no manifest, or a damaged one
        file.seek(0)
        start = file.read(_LABEL_SEARCH_BYTES)
        if sidecar or any(label in start for label in _MANIFEST_LABELS):
            return Credentials("invalid", problems=(_cause(error),), sidecar=sidecar)
        return None


def _credentials(values: Mapping[str, Any], state: str | None, *, sidecar: bool) -> Credentials:
    """Convert a report of the C2PA library."""
    manifest = (values.get("manifests") or {}).get(values.get("active_manifest")) or {}
    data = {one.get("label"): one.get("data") or {} for one in manifest.get("assertions", ())}
    actions = (data.get("c2pa.actions.v2") or data.get("c2pa.actions") or {}).get("actions", [])
    types = [one["digitalSourceType"] for one in actions if one.get("digitalSourceType")]
    problems = [one.get("code", "") for one in values.get("validation_status") or ()]
    signature = manifest.get("signature_info") or {}
    return Credentials(
        {"Trusted": "trusted", "Valid": "untrusted"}.get(state or "", "invalid"),
        issuer=signature.get("issuer"),
        signer=signature.get("common_name"),
        actions=tuple(str(one.get("action")) for one in actions),
        source_type=str(types[-1]).removeprefix(_SOURCE_TYPE) if types else None,
        generation=data.get(ASSERTION),
        parents=tuple(str(one.get("title")) for one in manifest.get("ingredients", ())),
        problems=tuple(problems),
        sidecar=sidecar,
    )


def _context(authorities: Sequence[str]) -> "Context":
    """Return a context with network access disabled and the trusted authorities."""
    from c2pa import Context, Settings

    values: dict[str, Any] = {
        "builder": {"thumbnail": {"enabled": False}},
        "core": {"backing_store_memory_threshold_in_mb": _MEMORY_MIB},  # more goes to a file
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
    }
    if authorities:
        values["trust"] = {"trust_anchors": "\n".join(authorities)}
    return Context(settings=Settings.from_dict(values))


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
