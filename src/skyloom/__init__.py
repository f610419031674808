"""skyloom: self-hosted video generation and editing. Heavy modules are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skyloom.core.version import __version__

if TYPE_CHECKING:
    from skyloom.core.audio import Audio as Audio
    from skyloom.generate.pipeline import Pipeline as Pipeline
    from skyloom.generate.pipeline import load as load
    from skyloom.generate.request import Request as Request
    from skyloom.media.video import Video as Video

__all__ = ["Audio", "Pipeline", "Request", "Video", "__version__", "load"]

_EXPORTS = {
    "Audio": "skyloom.core.audio",
    "Pipeline": "skyloom.generate.pipeline",
    "Request": "skyloom.generate.request",
    "Video": "skyloom.media.video",
    "load": "skyloom.generate.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'skyloom' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
