"""Operations on several parameters, and writes to them, anywhere in a step: plain Lightning's numbers, to the bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.errors import ResidencyError
from tests.helpers.training import make_trainer, streamed
from tests.simulated_cuda import requested

WIDTH, STEPS = 32, 5


class Student(pl.LightningModule):
    """Distils a teacher. ``act`` runs in each step before its forward; ``penalty`` is a part of the loss."""

    def __init__(self, act: Callable[[Student], Any] | None = None, penalty: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        for param in self.teacher.parameters():
            param.mul_(0.5)
        self._act, self._penalty = act, penalty
        self.seen: list[Any] = []
        self.kept: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            if self._act is not None:
                self.seen.append(self._act(self))
            target = self.teacher(batch)
        loss = (self.net(batch + 0.1) - target).square().mean() + self.net(batch).square().mean()
        if self._penalty is not None:
            loss = loss + self._penalty(self)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 1e-2)


def run(tmp_path: Path, strategy: Any, module: Callable[[], Any], **trainer: Any) -> Any:
    pl.seed_everything(3, verbose=False)
    made = module()
    data = torch.randn(STEPS * 4, WIDTH, generator=torch.Generator().manual_seed(4))
    make_trainer(tmp_path, strategy, max_steps=STEPS, **trainer).fit(made, DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    return made.seen, {name: value.detach().clone() for name, value in made.state_dict().items()}


def assert_as_plain(tmp_path: Path, module: Callable[[], Any], strategies: list[Any], **trainer: Any) -> None:
    seen, weights = run(tmp_path, "auto", module, **trainer)
    for settings in strategies:
        our_seen, our_weights = run(tmp_path, streamed(**settings), module, **trainer)
        assert our_seen == seen, settings
        assert [name for name in weights if not torch.equal(weights[name], our_weights[name])] == [], settings


def pairs(module: Student) -> Any:
    return zip(module.teacher.parameters(), module.net.parameters(), strict=True)


def average_in_place(module: Student) -> None:
    for teacher, student in pairs(module):
        teacher.mul_(0.9).add_(student, alpha=0.1)


def average_by_data(module: Student) -> None:
    for teacher, student in pairs(module):
        teacher.data.lerp_(student.data, 0.1)


def average_by_assignment(module: Student) -> None:
    for teacher, student in pairs(module):
        teacher.data = teacher.data * 0.9 + student.data * 0.1


def average_by_lists(module: Student) -> None:
    for mine, theirs in zip(module.teacher, module.net, strict=True):
        teachers, students = list(mine.parameters()), list(theirs.parameters())
        if teachers:
            torch._foreach_mul_(teachers, 0.9)
            torch._foreach_add_(teachers, students, alpha=0.1)


def average_by_views(module: Student) -> None:
    for teacher, student in pairs(module):
        view, other = teacher.view(-1), student.view(-1)
        view.lerp_(other, 0.1)


def average_by_copy(module: Student) -> None:
    for teacher, student in pairs(module):
        teacher.copy_(student * 0.1 + teacher * 0.9)


def average_by_state_dict(module: Student) -> None:
    theirs = module.net.state_dict()
    for name, value in module.teacher.state_dict().items():
        value.mul_(0.9).add_(theirs[name], alpha=0.1)


def distances(module: Student) -> list[float]:
    found = []
    for teacher, student in pairs(module):
        found += [teacher.norm().item(), (teacher - student).norm().item(), (teacher * student).sum().item()]
    return found


def mix_trained_layers(module: Student) -> None:
    layers = [layer for layer in module.net if isinstance(layer, nn.Linear)]
    for one, two in itertools.pairwise(layers):
        one.weight.mul_(0.5).add_(two.weight, alpha=0.5)


def exchange(module: Student) -> None:
    for teacher, student in pairs(module):
        before = teacher.data
        teacher.data = student.data
        student.data = before


def write_through_a_view(module: Student) -> None:
    view = module.teacher[0].weight.data[:2]
    module.net[2].weight.norm(), module.net[4].weight.norm()
    view.mul_(0.5)


def attract(module: Student) -> Tensor:
    layers = [layer.weight for layer in module.net if isinstance(layer, nn.Linear)]
    found = torch.zeros(())
    for one, two in itertools.pairwise(layers):
        found = found + (one * two).sum().square() * 1e-3 + (one - two).pow(2).sum() * 1e-3
    return found


MIN, SOME, ALL = ({"host_memory": memory} for memory in ("min", "16896KiB", "256MiB"))
ACTS = [
    average_in_place,
    average_by_data,
    average_by_assignment,
    average_by_lists,
    average_by_copy,
    distances,
    mix_trained_layers,
    write_through_a_view,
]


@pytest.mark.parametrize("act", ACTS)
def test_what_a_step_does_to_several_parameters_counts(tmp_path: Path, act: Callable[[Student], Any]) -> None:
    assert_as_plain(tmp_path, lambda: Student(act), [MIN, SOME, ALL])


@pytest.mark.parametrize("act", [average_by_views, exchange])
def test_views_that_live_on_to_the_next_pair_need_room_for_both(tmp_path: Path, act: Callable[[Student], Any]) -> None:
    if not requested():  # a device has the room
        with pytest.raises(ResidencyError, match="do not keep views"):
            run(tmp_path, streamed(), lambda: Student(act))
    assert_as_plain(tmp_path, lambda: Student(act), [SOME, ALL, *([MIN] if requested() else [])])


def test_a_penalty_over_pairs_of_layers(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, lambda: Student(penalty=attract), [MIN, SOME, ALL])


def gradient_norms(module: Student) -> Tensor:
    """Of every parameter at once, in a step: gradients need the graph, not the values."""
    loss = module.net(torch.ones(2, WIDTH)).square().mean()
    grads = torch.autograd.grad(loss, list(module.net.parameters()), retain_graph=True)
    one = torch.autograd.grad(loss, module.net[0].weight, retain_graph=True)[0]
    return loss * (1 + torch.stack([grad.norm() for grad in grads]).sum() + one.norm()).detach()


def differentiable_gradient_norms(module: Student) -> Tensor:
    loss = module.net(torch.ones(2, WIDTH)).square().mean()
    params = [module.net[0].weight, module.net[2].bias, module.teacher[0].weight.requires_grad_()]
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    module.teacher.requires_grad_(False)
    return sum((grad.square().sum() for grad in grads), torch.zeros(()))


def some_gradients(module: Student) -> Tensor:
    loss = module.net(torch.ones(2, WIDTH)).square().mean()
    chosen = [module.net[4].weight, module.net[6].bias]
    module.zero_grad()
    loss.backward(inputs=chosen)
    found = sum(param.grad.norm().item() for param in module.net.parameters() if param.grad is not None)
    assert all((param.grad is not None) == any(param is one for one in chosen) for param in module.net.parameters())
    for param in chosen:
        param.grad = None
    return torch.tensor(found)


@pytest.mark.not_simulated(reason="plain Lightning does not run it on a device either")
@pytest.mark.parametrize("penalty", [gradient_norms, differentiable_gradient_norms, some_gradients])
def test_gradients_of_parameters_inside_a_step(tmp_path: Path, penalty: Callable[[Student], Tensor]) -> None:
    assert_as_plain(tmp_path, lambda: Student(penalty=penalty), [MIN, SOME, ALL])
    assert_as_plain(tmp_path, lambda: Student(penalty=penalty), [{"activations": "keep"}])


@pytest.mark.parametrize("act", [average_by_state_dict])
def test_what_needs_more_than_fits_at_once_is_refused_before_it_computes(
    tmp_path: Path, act: Callable[[Student], Any]
) -> None:
    """It takes views of every parameter."""
    too_little: dict[str, Any] = {"device_memory": "16KiB"} if requested() else {}
    with pytest.raises(ResidencyError, match="raise"):
        run(tmp_path, streamed(**too_little), lambda: Student(act))
    assert_as_plain(tmp_path, lambda: Student(act), [ALL])
