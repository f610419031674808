"""Content credentials: a signed C2PA manifest in every file, or beside it where the format has no place for one.

A manifest says that the file was made (or edited) by a trained model, by which, and from what; any change of the file
breaks it. Signing comes last, after everything else is written, and never goes online: no time stamp, no revocation
list, no remote manifest. C2PA 2.2, https://c2pa.org; `skyloom.generation` is our own assertion.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.version import __version__
from skyloom.media.write import atomic_output
from skyloom.safety.signer import Signer, own_authority

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
_SNIFFED = 16
ASSERTION = "skyloom.generation"
MAX_SIDECAR = 16 * 2**20
_MARKERS, _HEAD = (
    (b"jumdc2pa", b"jumdc2ma", b"urn:c2pa"),
    2**20,
)  # words of every manifest, and where it lies
_PLAIN = "application/octet-stream"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MADE, _COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
_SAID = ("seed", "size", "seconds", "fps", "num_steps", "guidance_scale", "quality")


@dataclass(frozen=True)
class Ingredient:
    """A file that a video was made from: `edited` is what it is an edit of, everything else only went into it."""

    path: Path
    edited: bool = False


@dataclass(frozen=True)
class Credentials:
    """What a file's manifest says. `state`: "trusted" (whole, signed by this machine or by an authority that was
    named), "untrusted" (whole, signer unknown), "invalid" (file or manifest was changed: `problems` say where)."""

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
        """Plain values, as JSON has them."""
        return asdict(self)


def generation_assertion(
    receipt: Mapping[str, Any], *, with_prompt: bool = False
) -> dict[str, Any]:
    """What our assertion says of a receipt (Receipt.to_dict): never the prompt, unless it is asked for."""
    asked = receipt.get("request") or {}
    said = {
        "version": receipt.get("skyloom"),
        "model": receipt.get("model"),
        "weights": receipt.get("weights"),
    }
    said |= {name: asked.get(name) for name in _SAID} | {
        "frames": (receipt.get("frames") or {}).get("sha256")
    }
    if with_prompt:
        said |= {
            "prompt": asked.get("prompt"),
            "cards": [card.get("prompt") for card in asked.get("cards", [])] or None,
        }
    return {name: value for name, value in said.items() if value is not None}


def sidecar_of(path: Path) -> Path:
    """Where the manifest of a file lies whose format has no place for one: beside it, as `video.webm.c2pa`."""
    return path.with_name(path.name + SIDECAR)


def sign(
    path: Path,
    generation: Mapping[str, Any],
    signer: Signer,
    *,
    sources: Sequence[Ingredient] = (),
    verb: str | None = None,
) -> Path:
    """Put a signed manifest into a finished file, or beside it; whole or not at all. Returns where the manifest is.

    Raises MediaError when a file cannot be read, written or signed.
    """
    from c2pa import Builder, C2paError, C2paSignerInfo, C2paSigningAlg
    from c2pa import Signer as Pen

    kind = EMBEDDED.get(path.suffix.lower())
    target = path if kind else sidecar_of(path)
    try:
        pen = Pen.from_info(
            C2paSignerInfo(C2paSigningAlg.ES256, signer.chain.encode(), signer.key.encode(), None)
        )
        manifest = _manifest(path.name, generation, sources, verb)
        with (
            Builder(manifest, context=_context(())) as builder,
            pen,
            atomic_output(target) as partial,
        ):
            for index, source in enumerate(sources):
                _add(builder, source, f"source-{index}")
            if not kind:
                builder.set_no_embed()
            with path.open("rb") as file, partial.open("w+b") as signed:
                content = builder.sign(pen, kind or _PLAIN, file, signed)
            if not kind:
                partial.write_bytes(content)
    except C2paError as error:
        raise MediaError(
            f"{path} cannot be signed ({_cause(error)}).", hint="Use --no-credentials."
        ) from error
    return target


def read(path: Path, authorities: Sequence[str] | None = None) -> Credentials | None:
    """What the manifest in a file, or in the sidecar beside it, says; None where there is neither.

    `authorities` are certificates (PEM) to trust; None: this machine's own. Raises MediaError for a file that cannot
    be opened.
    """
    if authorities is None:
        own = own_authority()
        authorities = () if own is None else (own,)
    sidecar = sidecar_of(path)
    try:
        with path.open("rb") as file:
            kind = _kind(file.read(_SNIFFED))
            file.seek(0)
            if kind and (found := _read(file, kind, None, authorities)):
                return found
            if not sidecar.is_file():
                return None
            if sidecar.stat().st_size > MAX_SIDECAR:
                return Credentials("invalid", problems=("the sidecar is too large",), sidecar=True)
            return _read(file, _PLAIN, sidecar.read_bytes(), authorities)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _kind(start: bytes) -> str | None:
    """What a file is by its first bytes, whatever it is called; None for what carries no manifest inside."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return EMBEDDED[".webp"]
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return EMBEDDED[".avi"]
    if start[4:8] == b"ftyp":
        return EMBEDDED[".mov" if start[8:12] == b"qt  " else ".mp4"]
    known = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif"}
    return next(
        (EMBEDDED[suffix] for magic, suffix in known.items() if start.startswith(magic)), None
    )


def _manifest(
    title: str, generation: Mapping[str, Any], sources: Sequence[Ingredient], verb: str | None
) -> dict[str, Any]:
    """The manifest's own words: what was done, and our assertion."""
    edited = [f"source-{index}" for index, source in enumerate(sources) if source.edited]
    others = [f"source-{index}" for index, source in enumerate(sources) if not source.edited]
    if len(edited) > 1:
        raise RequestError(
            "A manifest names one video that was edited.", hint="Mark one source as edited."
        )
    agent = {"name": "skyloom", "version": __version__}
    done: dict[str, Any] = {
        "action": "c2pa.edited" if edited else "c2pa.created",
        "softwareAgent": agent,
    }
    done["digitalSourceType"] = _SOURCE_TYPE + (_COMPOSITE if sources else _MADE)
    if verb:
        done["description"] = verb
    actions = [{"action": "c2pa.opened", "parameters": {"ingredientIds": edited}}] if edited else []
    actions.append(done)
    if others:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": others}})
    assertions = [
        {"label": "c2pa.actions.v2", "data": {"actions": actions}},
        {"label": ASSERTION, "data": generation},
    ]
    return {"claim_generator_info": [agent], "title": title, "assertions": assertions}


def _add(builder: Any, source: Ingredient, name: str) -> None:
    """A source as an ingredient, with the manifest that it brings along."""
    relation = "parentOf" if source.edited else "componentOf"
    told = {"title": source.path.name, "relationship": relation, "instance_id": name, "label": name}
    try:
        with source.path.open("rb") as file:
            builder.add_ingredient(told, EMBEDDED.get(source.path.suffix.lower(), _PLAIN), file)
    except OSError as error:
        raise MediaError(
            f"{source.path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _read(
    file: BinaryIO, kind: str, manifest: bytes | None, authorities: Sequence[str]
) -> Credentials | None:
    from c2pa import C2paError, Reader

    try:
        with Reader(kind, file, manifest, context=_context(authorities)) as reader:
            return _told(
                json.loads(reader.json()),
                reader.get_validation_state(),
                sidecar=manifest is not None,
            )
    except (C2paError, ValueError) as error:
        file.seek(0)  # a file without a manifest ends here, and a broken one, with or without
        head = file.read(_HEAD)
        claimed = manifest is not None or any(marker in head for marker in _MARKERS)
        return (
            Credentials("invalid", problems=(_cause(error),), sidecar=manifest is not None)
            if claimed
            else None
        )


def _told(values: Mapping[str, Any], state: str | None, *, sidecar: bool) -> Credentials:
    """Our words for what the library found."""
    manifest = (values.get("manifests") or {}).get(values.get("active_manifest")) or {}
    data = {one.get("label"): one.get("data") or {} for one in manifest.get("assertions", ())}
    actions = (data.get("c2pa.actions.v2") or data.get("c2pa.actions") or {}).get("actions", [])
    types = [one["digitalSourceType"] for one in actions if one.get("digitalSourceType")]
    problems = [one.get("code", "") for one in values.get("validation_status") or ()]
    signature = manifest.get("signature_info") or {}
    return Credentials(
        {"Trusted": "trusted", "Valid": "untrusted"}.get(state or "", "invalid"),
        signature.get("issuer"),
        signature.get("common_name"),
        tuple(str(one.get("action")) for one in actions),
        str(types[-1]).removeprefix(_SOURCE_TYPE) if types else None,
        data.get(ASSERTION),
        tuple(str(one.get("title")) for one in manifest.get("ingredients", ())),
        tuple(problems),
        sidecar,
    )


def _context(authorities: Sequence[str]) -> "Context":
    """Settings that keep the library off the network, and whom it is to trust."""
    from c2pa import Context, Settings

    values: dict[str, Any] = {
        "builder": {"thumbnail": {"enabled": False}},
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
    }
    if authorities:
        values["trust"] = {"trust_anchors": "\n".join(authorities)}
    return Context(settings=Settings.from_dict(values))


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
