"""Characters: clips under a name that prompts can use."""

from skyloom.serve.api.dependencies import AppServices, Reader, Writer
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import CharacterBody
from skyloom.serve.api.response_models import CharacterResponse
from skyloom.serve.api.routing import limit, make_router

router = make_router()


@router.post("/v1/videos/characters", responses=errors(404))
@limit("inspect")
def create_character(
    body: CharacterBody, caller: Writer, services: AppServices
) -> CharacterResponse:
    """Make a character of a clip.

    The policy checks the name and the clip; a process of its own recognises who the clip shows.
    """
    owner = caller.owner
    services.checks.moderate(body.name, param="name")
    services.library.check_room(owner, characters=1)
    source = services.media.video(owner, body.video, "video")
    consent = services.checks.check_consent(
        body.consent, has_media=True, is_uploaded=source.job is None
    )
    verdict, likeness = services.effects.view(source.asset, True)
    services.checks.reject_blocked(verdict, "input", "video")
    character = services.library.add_character(
        owner, body.name, source.asset.reference, likeness, consent
    )
    return CharacterResponse.from_character(character)


@router.get("/v1/videos/characters/{id}", responses=errors(404))
def get_character(id: str, caller: Reader, services: AppServices) -> CharacterResponse:
    """Get a character."""
    return CharacterResponse.from_character(services.library.character(id, caller.owner))
