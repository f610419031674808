"""Models: the names that requests may use."""

from skyloom.serve.api.dependencies import AppServices, Reader
from skyloom.serve.api.errors import missing
from skyloom.serve.api.model_aliases import list_model_aliases
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.response_models import ModelList, ModelResponse
from skyloom.serve.api.routing import make_router

router = make_router()


@router.get("/v1/models")
def list_models(caller: Reader, services: AppServices) -> ModelList:
    """List models."""
    named = list_model_aliases(services.settings).values()
    return ModelList(data=[ModelResponse.model_validate(one) for one in named])


@router.get("/v1/models/{id}", responses=errors(404))
def get_model(id: str, caller: Reader, services: AppServices) -> ModelResponse:
    """Get a model."""
    named = list_model_aliases(services.settings).get(id)
    if named is None:
        raise missing("model", id, "model")
    return ModelResponse.model_validate(named)
