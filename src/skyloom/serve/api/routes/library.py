"""Characters, models and files: what prompts name and what videos start from."""

import io
from typing import BinaryIO, cast

from starlette.responses import Response

from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import PAGE, Asked, Call, Reply
from skyloom.serve.api.errors import invalid, missing
from skyloom.serve.api.media_inputs import sniff
from skyloom.serve.api.model_aliases import Named, list_named
from skyloom.serve.api.request_models import CharacterBody, FileBody, parse
from skyloom.serve.api.routes.videos import send
from skyloom.serve.queue.library import PURPOSES
from skyloom.serve.storage import Asset

MODEL_DATE = 1758941485  # one date for all: manifests have none
_HEAD = 64


def create_character(asked: Asked) -> Reply:
    """Keep a clip under a name, once the policy has seen both and the clip was looked at, in a process of its own."""
    body, services = parse(CharacterBody, asked.fields), asked.services
    services.desk.allow(body.name, param="name")
    services.library.check_room(asked.owner, characters=1)
    source = services.sources.video(asked.owner, body.video, "video")
    consent = services.desk.attested(body.consent, media=True, outside=source.job is None)
    verdict, likeness = services.outside.view(source.asset, True)
    services.desk.refuse(verdict, "input", "video")
    kept = services.library.add_character(
        asked.owner, body.name, source.asset.reference, likeness, consent
    )
    return Reply(answers.character(kept))


def get_character(asked: Asked) -> Reply:
    """A character of the owner's."""
    return Reply(answers.character(asked.services.library.character(asked.id, asked.owner)))


def list_models(asked: Asked) -> Reply:
    """Every name that can be asked for."""
    return Reply(
        {
            "object": "list",
            "data": [_model(named) for named in list_named(asked.services.settings).values()],
        }
    )


def get_model(asked: Asked) -> Reply:
    """One of them."""
    names = list_named(asked.services.settings)
    if asked.id not in names:
        raise missing("model", asked.id, "model")
    return Reply(_model(names[asked.id]))


def create_file(asked: Asked) -> Reply:
    """Keep a file: pictures and videos by what they are, a batch's lines as text."""
    body = parse(FileBody, asked.fields)
    if body.purpose not in PURPOSES:
        raise invalid("purpose", f"purpose must be {', '.join(PURPOSES)}.")
    file = cast(BinaryIO, body.file.file)
    file.seek(0)
    text = body.purpose == "batch"
    suffix = "jsonl" if text else sniff(file.read(_HEAD))
    if suffix is None:
        raise invalid("file", "'file' is no picture or video that can be read.", "invalid_media")
    size = file.seek(0, io.SEEK_END)
    asked.services.library.check_room(asked.owner, files=1, file_bytes=size)
    file.seek(0)
    asset = asked.services.sources.keep(file, suffix)
    kept = asked.services.library.add_file(
        asked.owner, body.purpose, body.file.name, asset.reference, size
    )
    return Reply(answers.file(kept))


def list_files(asked: Asked) -> Reply:
    """A page of the owner's files."""
    page, purpose = asked.page(), asked.query.get("purpose")
    if purpose is not None and purpose not in PURPOSES:
        raise invalid("purpose", f"purpose must be {', '.join(PURPOSES)}.")
    rows, more = asked.services.library.files(
        asked.owner,
        purpose=purpose,
        after=page.after,
        limit=page.limit,
        newest_first=page.newest_first,
    )
    return Reply(answers.page([answers.file(row) for row in rows], more=more))


def get_file(asked: Asked) -> Reply:
    """What is known of a file."""
    return Reply(answers.file(asked.services.library.file(asked.id, asked.owner)))


def get_file_content(asked: Asked) -> Response:
    """The bytes of a file."""
    file = asked.services.library.file(asked.id, asked.owner)
    asset = Asset.parse(file.asset)
    return send(asked, asset, f"{file.id}.{asset.suffix}")


def delete_file(asked: Asked) -> Reply:
    """Forget a file."""
    asked.services.library.delete_file(asked.id, asked.owner)
    return Reply({"id": asked.id, "object": "file", "deleted": True})


def _model(named: Named) -> dict[str, object]:
    info = named.info
    told = {"id": named.name, "object": "model", "created": MODEL_DATE, "owned_by": info.family}
    return {
        **told,
        "base_model": info.name,
        "sizes": list(info.sizes),
        "fps": info.fps,
        "licence": info.licence,
    }


CALLS = (
    Call(
        "POST",
        "/v1/videos/characters",
        create_character,
        "Keep a character.",
        answers.CharacterAnswer,
        "write",
        CharacterBody,
        faults=(404, 503),
        kind="inspect",
    ),
    Call(
        "GET",
        "/v1/videos/characters/{id}",
        get_character,
        "Look at a character.",
        answers.CharacterAnswer,
        faults=(404,),
    ),
    Call("GET", "/v1/models", list_models, "List models.", answers.ModelList),
    Call(
        "GET", "/v1/models/{id}", get_model, "Look at a model.", answers.ModelAnswer, faults=(404,)
    ),
    Call(
        "POST",
        "/v1/files",
        create_file,
        "Keep a file to start from.",
        answers.FileAnswer,
        "write",
        FileBody,
        kind="upload",
    ),
    Call(
        "GET",
        "/v1/files",
        list_files,
        "List files.",
        answers.FileList,
        query=(*PAGE, "purpose"),
        faults=(404,),
    ),
    Call("GET", "/v1/files/{id}", get_file, "Look at a file.", answers.FileAnswer, faults=(404,)),
    Call(
        "GET",
        "/v1/files/{id}/content",
        get_file_content,
        "Download a file.",
        "application/octet-stream",
        faults=(404, 416),
        kind="download",
    ),
    Call(
        "DELETE",
        "/v1/files/{id}",
        delete_file,
        "Delete a file.",
        answers.Deleted,
        "write",
        faults=(404,),
    ),
)
