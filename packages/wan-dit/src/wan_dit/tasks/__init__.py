"""Tasks: what a backbone is given besides text, as objects. Importing it imports no torch.

Example:
    >>> from wan_dit.tasks import ImageToVideo
    >>> pipe("a cat walks away", task=ImageToVideo("cat.png")).save("cat.mp4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._shared.exports import exported

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
    "Continuation": "continuation",
    "ImageToVideo": "image",
    "Prepared": "task",
    "Target": "task",
    "Task": "task",
    "TextToVideo": "image",
    "Vace": "vace",
    "task_of": "record",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS)
