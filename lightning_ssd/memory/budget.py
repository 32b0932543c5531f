"""One reserve of host memory, two accounts: gradients that wait for their update, and saved inputs. Pure arithmetic.

Backward produces gradients while it consumes saved inputs, so each may use what the other does not need.
"""

from __future__ import annotations


class SharedBudget:
    """How many bytes gradients and saved inputs may take, and how many they take now.

    Gradients may use what saved inputs leave free. While they do, saved inputs get that much less; the memory comes
    back when the updates have run, under the next forward at the latest. Each counter is changed by one party, under
    that party's lock; the other reads it without a lock, so a limit may be a moment old.

    Args:
        gradients_nbytes: Reserved for gradients that wait for their update.
        saved_inputs_nbytes: Reserved for inputs of recomputed modules; None for no bound, and then none is lent.
        lends: Gradients may use the free part of the saved inputs' reserve. Not on a GPU: gradients that come off it
            lie in memory of their own.

    Attributes:
        held_gradients_nbytes: What waiting gradients take that nothing else holds.
        held_saved_inputs_nbytes: What saved inputs take that nothing else holds.
    """

    def __init__(self, *, gradients_nbytes: int = 0, saved_inputs_nbytes: int | None = 0, lends: bool = True) -> None:
        self._gradients_nbytes = gradients_nbytes
        self._saved_inputs_nbytes = saved_inputs_nbytes
        self._lends = lends
        self.held_gradients_nbytes = 0
        self.held_saved_inputs_nbytes = 0

    @property
    def gradients_limit_nbytes(self) -> int:
        """What gradients may take now."""
        if self._saved_inputs_nbytes is None or not self._lends:
            return self._gradients_nbytes
        return self._gradients_nbytes + max(self._saved_inputs_nbytes - self.held_saved_inputs_nbytes, 0)

    @property
    def saved_inputs_limit_nbytes(self) -> int | None:
        """What saved inputs may take now; None for no bound."""
        if self._saved_inputs_nbytes is None:
            return None
        lent = max(self.held_gradients_nbytes - self._gradients_nbytes, 0)
        return max(self._saved_inputs_nbytes - lent, 0)
