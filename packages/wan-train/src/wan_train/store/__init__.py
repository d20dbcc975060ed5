"""What keeps the work of a run: checkpoints that are whole or not there, guards, signals, figures of its health and exports.

Example, on every process alike:
    >>> with Store("runs/mine/checkpoints", keep=3) as store:
    ...     state = training_state(modules, optimisers, values={"step": 0})
    ...     if (step := store.latest()) is not None:
    ...         store.load(step, state)
    ...         values = restore(state, optimisers)
    ...     store.save(100, training_state(modules, optimisers, values={"step": 100}))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wan_dit._shared.exports import exported

if TYPE_CHECKING:
    from .guard import Guard as Guard
    from .guard import Verdict as Verdict
    from .signals import Signals as Signals
    from .states import restore as restore
    from .states import training_state as training_state
    from .store import Store as Store

_EXPORTS = {
    "Store": "store",
    "training_state": "states",
    "restore": "states",
    "Guard": "guard",
    "Verdict": "guard",
    "Signals": "signals",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = exported(__name__, _EXPORTS)
