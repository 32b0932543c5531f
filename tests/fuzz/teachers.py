"""The ways in which people write that a teacher follows its student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 0.9  # of the teacher, in each update

Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def mul_add(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.mul_(KEPT).add_(student, alpha=1 - KEPT)


def mul_add_data(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.data.mul_(KEPT).add_(student.data, alpha=1 - KEPT)


def lerp(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.lerp_(student, 1 - KEPT)


def data_lerp(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.data.lerp_(student.data, 1 - KEPT)


def assign_data(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.data = teacher.data * KEPT + student.data * (1 - KEPT)


def copied(pairs: Pairs) -> None:
    for teacher, student in pairs:
        teacher.copy_(KEPT * teacher + (1 - KEPT) * student)


def expression(pairs: Pairs) -> None:
    news = [KEPT * teacher.detach() + (1 - KEPT) * student.detach() for teacher, student in pairs]
    for (teacher, _), new in zip(pairs, news, strict=True):
        teacher.data.copy_(new)


def out(pairs: Pairs) -> None:
    for teacher, student in pairs:
        torch.lerp(teacher, student, 1 - KEPT, out=teacher)


def foreach_lerp(pairs: Pairs) -> None:
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - KEPT)


def foreach_mul_add(pairs: Pairs) -> None:
    torch._foreach_mul_([t for t, _ in pairs], KEPT)
    torch._foreach_add_([t for t, _ in pairs], [s for _, s in pairs], alpha=1 - KEPT)


BY_PAIRS: dict[str, Callable[[Pairs], None]] = {
    **{f.__name__: f for f in (mul_add, mul_add_data, lerp, data_lerp, assign_data, expression, out, foreach_lerp)},
    "foreach_mul_add": foreach_mul_add,
    "copy": copied,
}
TEACHERS = (*BY_PAIRS, "state_dict", "load_state_dict", "averaged_model", "remembered_pairs")


class Following:
    """Makes a teacher follow.

    Args:
        way: Of `TEACHERS`.
        teacher: The module that follows.
        student: The one that it follows.
    """

    def __init__(self, way: str, teacher: Any, student: nn.Module) -> None:
        self._way, self._teacher, self._student = way, teacher, student
        self._remembered = self._pairs() if way == "remembered_pairs" else []

    def _pairs(self) -> Pairs:
        return list(zip(self._teacher.parameters(), self._student.parameters(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        if self._way == "averaged_model":
            self._teacher.update_parameters(self._student)
        elif self._way == "remembered_pairs":
            mul_add(self._remembered)
        elif self._way == "state_dict":
            student = self._student.state_dict()
            for name, value in self._teacher.state_dict().items():
                value.copy_(_mixed(value, student[name]))
        elif self._way == "load_state_dict":
            student = self._student.state_dict()
            self._teacher.load_state_dict(
                {name: _mixed(value, student[name]) for name, value in self._teacher.state_dict().items()}
            )
        else:
            BY_PAIRS[self._way](self._pairs())


def _mixed(teacher: Tensor, student: Tensor) -> Tensor:
    is_number = teacher.is_floating_point() or teacher.is_complex()
    return teacher * KEPT + student * (1 - KEPT) if is_number else student
