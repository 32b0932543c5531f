"""How long a job will take, from those before it: start-up, and a part that grows with the parameters."""

from __future__ import annotations

START_S = 25.0  # imports, the device's context, Lightning, a plan, rates of copies


class Guess:
    """An affine guess.

    Args:
        s_per_param: What the first is guessed by, beside `START_S`.
    """

    def __init__(self, s_per_param: float) -> None:
        self._s_per_param = s_per_param
        self._seen: list[tuple[int, float]] = []

    def add(self, num_params: int, seconds: float) -> None:
        """A job has taken so long."""
        self._seen.append((num_params, seconds))

    def seconds(self, num_params: int) -> float:
        """What a job of so many parameters will take."""
        if not self._seen:
            return START_S + self._s_per_param * num_params
        last_params, last_s = max(self._seen)
        first_params, first_s = min(self._seen)
        if first_params == last_params:
            slope = max(last_s - START_S, 0.0) / last_params
        else:
            slope = (last_s - first_s) / (last_params - first_params)
        return max(last_s + max(slope, 0.0) * (num_params - last_params), 0.0)
