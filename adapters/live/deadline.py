"""When a source gives up, because nothing has come for too long."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

_CANCELLING_S = 1.0  # for what is given up to let go


class GiveUpDeadline:
    """So many seconds after it was restarted last; never, where there is no limit.

    Made on an event loop, whose clock it goes by. `restart` may be called from any thread.
    """

    def __init__(self, give_up_after_s: float) -> None:
        """Starts with all of the time left.

        Args:
            give_up_after_s: the time allowed; 0: without end.
        """
        self._give_up_after_s = give_up_after_s or math.inf
        self._clock = asyncio.get_running_loop().time
        self._at_s = math.inf
        self.restart()

    def restart(self) -> None:
        """Something came: all of the time is left again."""
        self._at_s = self._clock() + self._give_up_after_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 once it has passed; infinite where it never does."""
        return max(self._at_s - self._clock(), 0.0)

    async def outlasts(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the deadline has not passed before ``work`` ended; else ``work`` is cancelled.

        Cancelling this cancels ``work``, too; either way it has a moment to let go.

        Raises:
            Whatever ``work`` raises.
        """
        working = asyncio.create_task(work, name="until the deadline")
        try:
            while not working.done() and self.left_s > 0.0:
                left_s = self.left_s
                await asyncio.wait((working,), timeout=left_s if left_s < math.inf else None)
        finally:
            if not working.done():
                working.cancel()
                await asyncio.wait((working,), timeout=_CANCELLING_S)
        if not working.done() or working.cancelled():
            return False
        working.result()
        return True
