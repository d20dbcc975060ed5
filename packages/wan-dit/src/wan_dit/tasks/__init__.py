"""Tasks: what a backbone is given besides text, as objects. Importing it imports no torch.

Example:
    >>> from wan_dit.tasks import ImageToVideo
    >>> pipe("a cat walks away", task=ImageToVideo("cat.png")).save("cat.mp4")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .continuation import Continuation as Continuation
    from .image import ImageToVideo as ImageToVideo
    from .image import TextToVideo as TextToVideo
    from .record import task_of as task_of
    from .task import Prepared as Prepared
    from .task import Target as Target
    from .task import Task as Task
    from .vace import Vace as Vace

_EXPORTS = {
    "Continuation": "wan_dit.tasks.continuation",
    "ImageToVideo": "wan_dit.tasks.image",
    "Prepared": "wan_dit.tasks.task",
    "Target": "wan_dit.tasks.task",
    "Task": "wan_dit.tasks.task",
    "TextToVideo": "wan_dit.tasks.image",
    "Vace": "wan_dit.tasks.vace",
    "task_of": "wan_dit.tasks.record",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
