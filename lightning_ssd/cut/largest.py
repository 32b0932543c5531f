"""Why the largest unit is large, and what makes it smaller: memory for it is taken two or three times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

MUCH_LARGER = 4
"""Times the median unit from which a unit is worth a remark."""


def remark(name: str, shapes: Mapping[str, Sequence[int]], numels: Sequence[int], *, min_numel: int) -> str:
    """A sentence on the largest unit; empty if it is not much larger than others, or not large at all.

    Args:
        name: The unit's name.
        shapes: The shape of each of its parameters, by name.
        numels: Elements of each unit of the model.
        min_numel: The option ``min_unit_numel``.
    """
    numel, median = sum(map(math.prod, shapes.values())), statistics.median(numels)
    if numel <= MUCH_LARGER * max(median, min_numel):
        return ""
    tensor = max(shapes, key=lambda param: math.prod(shapes[param]))
    shape = "[" + ", ".join(map(str, shapes[tensor])) + "]"
    start = f"unit {name!r} is {numel / max(median, 1):.0f} times the median unit"
    if 2 * math.prod(shapes[tensor]) < numel:
        return f"{start}: name classes of smaller modules inside of it too in units=[...], to have them as units"
    if len(shapes[tensor]) == 3:
        return (
            f"{start}: {tensor!r} {shape} is fused, and one tensor is not split; where the model can have a module for "
            "each expert, they are units"
        )
    return f"{start}: {tensor!r} {shape} is one tensor, which is not split"
