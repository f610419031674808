"""Provenance: marks in a file, such as C2PA credentials and the watermark."""

from typing import BinaryIO, cast

from skyloom.serve.api.dependencies import AppServices, Writer
from skyloom.serve.api.request_models import ProvenanceBody
from skyloom.serve.api.response_models import ProvenanceResponse
from skyloom.serve.api.routing import limit, make_router

router = make_router()


@router.post("/v1/content_provenance_checks")
@limit("inspect")
def check_provenance(
    body: ProvenanceBody, caller: Writer, services: AppServices
) -> ProvenanceResponse:
    """Find provenance marks in a file: C2PA, watermark, local registry."""
    asset = services.media.store(cast(BinaryIO, body.file.file), "file")
    results = services.effects.verify(asset)
    return ProvenanceResponse(created_at=int(services.database.now()), results=results)
