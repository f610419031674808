"""skyloom: an open Sora in Python. A sentence in, a video out; importing it loads nothing heavy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyloom.generate.pipeline import Pipeline as Pipeline
    from skyloom.generate.pipeline import load as load
    from skyloom.generate.request import Request as Request
    from skyloom.media.video import Video as Video

__version__ = "0.1.0"
__all__ = ["Pipeline", "Request", "Video", "__version__", "load"]

_HOMES = {
    "Pipeline": "skyloom.generate.pipeline",
    "Request": "skyloom.generate.request",
    "Video": "skyloom.media.video",
    "load": "skyloom.generate.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'skyloom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
