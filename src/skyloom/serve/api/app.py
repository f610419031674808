"""The FastAPI application and its services."""

import re
import threading
from collections.abc import Iterable
from functools import partial

from fastapi import FastAPI
from fastapi.routing import APIRoute

from skyloom import __version__
from skyloom.serve.api.content_checks import ContentChecks
from skyloom.serve.api.dependencies import Services, SideEffects
from skyloom.serve.api.errors import add_error_handlers
from skyloom.serve.api.events import EventBroadcaster
from skyloom.serve.api.limits import (
    MEMORY_BYTES,
    MEMORY_BYTES_PER_OWNER,
    ByteBudget,
    ConcurrencyLimiters,
)
from skyloom.serve.api.media_inputs import MediaResolver
from skyloom.serve.api.metrics import Metrics
from skyloom.serve.api.middleware import HostOriginMiddleware, RequestLogMiddleware
from skyloom.serve.api.openapi import build_document
from skyloom.serve.api.routes import (
    batches,
    characters,
    edits,
    files,
    health,
    models,
    moderations,
    provenance,
    session,
    storyboards,
    videos,
    webhooks,
)
from skyloom.serve.api.submit import JobSubmitter
from skyloom.serve.queue.api_keys import KeyStore
from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.event_feed import EventFeed
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Library
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.sessions import SessionStore
from skyloom.serve.queue.webhooks import EndpointStore
from skyloom.serve.settings import Settings
from skyloom.serve.storage import AssetStorage
from skyloom.serve.storage.disk_reserve import DiskReserve

RESOURCES = (
    characters,
    storyboards,
    edits,
    videos,
    models,
    files,
    batches,
    webhooks,
    moderations,
    provenance,
    session,
    health,
)


def create_app(services: Services | None = None, hosts: Iterable[str] = ()) -> FastAPI:
    """The application, for requests whose Host header is one of `hosts`.

    Without services it answers nothing and only describes itself (`app.openapi()`).
    """
    app = FastAPI(
        title="skyloom",
        version=__version__,
        license_info={"name": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.services = services
    app.openapi = partial(build_document, app)
    for resource in RESOURCES:
        app.include_router(resource.router)
    add_error_handlers(app)
    app.add_middleware(HostOriginMiddleware, hosts=hosts)
    app.add_middleware(RequestLogMiddleware)  # the outermost
    return app


def make_services(
    settings: Settings,
    database: Database,
    storage: AssetStorage,
    effects: SideEffects,
    token: str,
    stopping: threading.Event,
) -> Services:
    """Stores and limits over one database and one storage."""
    keys = KeyStore(database, token)
    quotas = Quotas(settings)
    jobs = JobStore(database, settings, lambda: effects.workers().names)
    library = Library(database, quotas)
    reserve = DiskReserve(settings.data, settings.disk_reserve)
    fetch = effects.fetch if settings.url_references else None
    media = MediaResolver(jobs, library, storage, reserve, fetch)
    checks = ContentChecks(jobs, library, effects.moderate)
    return Services(
        settings=settings,
        database=database,
        jobs=jobs,
        library=library,
        batches=BatchStore(database, jobs, quotas),
        endpoints=EndpointStore(database, quotas),
        storage=storage,
        media=media,
        checks=checks,
        submitter=JobSubmitter(settings, jobs, media, checks),
        keys=keys,
        sessions=SessionStore(database, keys),
        metrics=Metrics(jobs.counts, jobs.refusals, effects.workers),
        effects=effects,
        reserve=reserve,
        limiters=ConcurrencyLimiters(),
        memory=ByteBudget(MEMORY_BYTES, MEMORY_BYTES_PER_OWNER),
        bodies=ByteBudget(settings.max_body_bytes, settings.max_body_bytes_per_owner),
        events=EventBroadcaster(EventFeed(database), stopping.is_set),
        draining=stopping.is_set,
    )


def _operation_id(route: APIRoute) -> str:
    """`post_v1_videos_id_remix`: method and path."""
    words = re.sub(r"\W+", "_", f"{min(route.methods or ['']).lower()}{route.path_format}")
    return words.strip("_")
