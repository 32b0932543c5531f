"""Offloaded parameters: metadata leaves them so, the first use of values makes them plain, and both are right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ssd.session.session import Session
from lightning_ssd.step.gathered import gathered
from tests.faults.support import streamed
from tests.helpers.models import GPT
from tests.helpers.plans import choose_plan
from tests.helpers.training import Module, Tokens, make_trainer, train


class Offloaded:
    """A session whose parameters are offloaded: set up, not in a step."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        net[2].requires_grad_(False)
        self.values = {name: param.detach().clone() for name, param in net.named_parameters()}
        self.module = Module(net, schedule=False)
        self.net = net
        self.trainer = make_trainer(tmp_path, streamed(**settings))
        strategy: Any = self.trainer.strategy
        self.trainer.strategy.connect(self.module)
        self.module.trainer = self.trainer
        self.trainer.state.fn = "fit"  # type: ignore[assignment]
        strategy.setup_environment()
        strategy.setup(self.trainer)
        self.strategy = strategy
        self.session: Session = strategy.session

    @property
    def weight(self) -> nn.Parameter:
        return self.net[0].weight

    def is_offloaded(self, param: Tensor) -> bool:
        return type(param) is not nn.Parameter


@pytest.fixture
def offloaded(tmp_path: Path) -> Iterator[Offloaded]:
    made = Offloaded(tmp_path)
    assert all(made.is_offloaded(param) for param in made.net.parameters())
    yield made
    made.strategy.teardown()
    vars(made).clear()  # pytest holds what a fixture gave


METADATA: dict[str, Callable[[nn.Parameter], Any]] = {
    "shape": lambda p: tuple(p.shape),
    "size()": lambda p: (p.size(), p.size(0), p.dim(), p.ndim, len(p)),
    "dtype": lambda p: (p.dtype, p.is_floating_point(), p.element_size(), p.itemsize, p.nbytes),
    "device": lambda p: (p.device, p.is_cuda, p.is_cpu, p.is_meta, p.get_device()),
    "layout": lambda p: (p.layout, p.is_contiguous(), p.stride(), p.storage_offset(), p.is_sparse),
    "numel": lambda p: (p.numel(), p.nelement(), torch.numel(p)),
    "requires_grad": lambda p: p.requires_grad,
    "requires_grad_()": lambda p: p.requires_grad_(True).requires_grad,
    "graph": lambda p: (p.is_leaf, p.grad_fn, p.output_nr, p.retains_grad),
    "grad": lambda p: p.grad,
    "grad set": lambda p: setattr(p, "grad", torch.ones(3, 4)),
    "grad deleted": lambda p: setattr(p, "grad", None),
    "hooks": lambda p: p.register_hook(lambda grad: grad).remove(),
    "post-accumulate hooks": lambda p: p.register_post_accumulate_grad_hook(lambda param: None).remove(),
    "zeros_like": lambda p: torch.zeros_like(p).sum().item(),
    "empty_like": lambda p: torch.empty_like(p).shape,
    "new_zeros": lambda p: p.new_zeros(2).sum().item(),
    "hash": lambda p: hash(p) == hash(p) and p in {p: 1},
    "isinstance": lambda p: isinstance(p, nn.Parameter),
    "is": lambda p: any(p is q for q in [p]),
    "result_type": lambda p: torch.result_type(p, 1.0),
}


def test_metadata_is_right_and_loads_nothing(offloaded: Offloaded) -> None:
    plain = nn.Parameter(offloaded.values["0.weight"].clone())
    for name, ask in METADATA.items():
        found = ask(offloaded.weight)
        assert offloaded.is_offloaded(offloaded.weight), name
        assert found == ask(plain), name


def saved(p: nn.Parameter) -> Tensor:
    file = io.BytesIO()
    torch.save({"p": p}, file)
    file.seek(0)
    return torch.load(file)["p"]


VALUES: dict[str, Callable[[nn.Parameter], Any]] = {
    "add": lambda p: p + 1,
    "matmul": lambda p: torch.ones(2, 4) @ p.t(),
    "linear": lambda p: nn.functional.linear(torch.ones(2, 4), p),
    "index": lambda p: p[1, 2:],
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "clone": lambda p: p.clone(),
    "item": lambda p: torch.tensor([value.item() for value in p.flatten()]),
    "tolist": lambda p: torch.tensor(p.tolist()),
    "numpy": lambda p: torch.from_numpy(p.detach().numpy()),
    "==": lambda p: p == p.detach().clone(),
    "in": lambda p: torch.tensor(p.flatten()[3].item() in p),
    "repr": lambda p: repr(p),
    "iteration": lambda p: torch.stack(list(p)),
    "deepcopy": lambda p: copy.deepcopy(p),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "torch.save": saved,
    "to": lambda p: p.to(torch.float64),
    "cat": lambda p: torch.cat([torch.zeros(1, 4), p]),
    "foreach": lambda p: torch._foreach_mul([p, p], 2.0)[1],
    "norm": lambda p: nn.utils.get_total_norm([p]),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "storage": lambda p: torch.tensor(list(p.untyped_storage()), dtype=torch.uint8).view(torch.float32),
    "as_subclass": lambda p: p.as_subclass(Tensor),
    "autograd.grad": lambda p: torch.autograd.grad((p * p).sum(), p)[0],
    "allclose": lambda p: torch.tensor(torch.allclose(p, p)),
    "dlpack": lambda p: torch.from_dlpack(p.detach()),
}


def test_values_are_right_and_the_parameter_is_plain_from_then_on(offloaded: Offloaded) -> None:
    plain = nn.Parameter(offloaded.values["0.weight"].clone())
    for name, use in VALUES.items():
        assert offloaded.is_offloaded(offloaded.weight), name
        found, expected = use(offloaded.weight), use(plain)
        assert type(offloaded.weight) is nn.Parameter, name
        assert type(offloaded.net[0].bias) is nn.Parameter, name  # the unit is loaded as one
        assert offloaded.is_offloaded(offloaded.net[1].weight), name
        if isinstance(expected, Tensor):
            assert type(found) is type(expected), name
            assert torch.equal(found, expected), name
            assert found.requires_grad == expected.requires_grad, name
        else:
            assert found == expected, name
        with offloaded.session.written_back():
            pass  # offloaded again


def test_what_bypasses_dispatch_sees_nan_or_the_values_if_gathered(offloaded: Offloaded) -> None:
    """`torch.vmap` takes tensors apart in C++; nothing can load them there, so nothing plausible may be in them."""
    assert torch.vmap(lambda row: row * 2)(offloaded.weight).isnan().all()
    with gathered(offloaded.net):
        assert torch.equal(torch.vmap(lambda row: row * 2)(offloaded.weight), 2 * offloaded.values["0.weight"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_modules_are_plain_and_independent(
    offloaded: Offloaded, copier: Callable[[nn.Module], nn.Module]
) -> None:
    copied = copier(offloaded.net)
    with torch.no_grad():
        for param in copied.parameters():
            assert type(param) is nn.Parameter
            param.add_(1)
    for name, value in offloaded.net.state_dict().items():
        assert torch.equal(value, offloaded.values[name])
    assert torch.equal(copied(torch.ones(1, 4)), copied.cpu()(torch.ones(1, 4)))


# -------------------------------------------------------------------------------------------------------------- writes


def stored(offloaded: Offloaded, name: str) -> Tensor:
    """What the store holds, read with the format's own library."""
    (unit,) = [unit for unit in offloaded.session.units if f"net.{name}" in unit.names]
    generation = offloaded.session.store.current(unit.name, "param")
    assert generation is not None
    with safe_open(offloaded.session.store.on_disk(generation).file.path, "pt") as file:
        return file.get_tensor(f"net.{name}")


def in_place(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(3)


def by_data(p: nn.Parameter) -> None:
    p.data.mul_(3)


def assigned(p: nn.Parameter) -> None:
    p.data = p.data * 3


def by_numpy(p: nn.Parameter) -> None:
    array = p.detach().numpy()
    array *= 3


def copied(p: nn.Parameter) -> None:
    p.data.copy_(p.detach() * 3)


WRITES = [in_place, by_data, assigned, by_numpy, copied]


@pytest.mark.not_simulated(reason="it is given tensors of the CPU")
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("linked", "host_memory"), [(False, "min"), (True, "min"), (False, "512MiB")])
def test_what_is_written_at_rest_is_used_and_reaches_no_checkpoint(
    tmp_path: Path, write: Callable[[nn.Parameter], None], linked: bool, host_memory: str
) -> None:
    offloaded = Offloaded(tmp_path, host_memory=host_memory)
    name, x = "2.weight", torch.eye(3)  # frozen: no update will write it
    layer = offloaded.net[2]

    def forward() -> Tensor:
        with torch.no_grad(), offloaded.strategy._stepping("validation_step"):
            return layer(x) - layer(torch.zeros(3, 3))

    before = offloaded.values[name]
    torch.testing.assert_close(forward(), before.t())
    if linked:
        offloaded.trainer.save_checkpoint(tmp_path / "checkpoint")
    write(layer.weight)
    torch.testing.assert_close(forward(), 3 * before.t())
    assert torch.equal(layer.weight, 3 * before)
    with offloaded.session.written_back():
        assert torch.equal(stored(offloaded, name), 3 * before)
    torch.testing.assert_close(forward(), 3 * before.t())
    if linked:
        content = offloaded.strategy.load_checkpoint(tmp_path / "checkpoint")
        assert torch.equal(content["state_dict"][f"net.{name}"], before)
    offloaded.strategy.teardown()
    assert torch.equal(layer.weight, 3 * before)


def test_looking_writes_nothing(offloaded: Offloaded) -> None:
    store, units = offloaded.session.store, offloaded.session.units
    generations = [store.current(unit.name, "param") for unit in units]
    [param.sum().item() for param in offloaded.net.parameters()]
    with offloaded.session.written_back():
        assert all(offloaded.is_offloaded(param) for param in offloaded.net.parameters())
    assert all(store.current(unit.name, "param") is g for unit, g in zip(units, generations, strict=True))


@pytest.mark.parametrize("saves", [False, True])
def test_views_that_the_user_keeps_show_old_values(tmp_path: Path, saves: bool) -> None:
    """Taken after each step, with or without a checkpoint that links the file, and compared ten steps later."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            if saves:
                trainer.save_checkpoint(tmp_path / "checkpoint")  # the one before goes, and its files are used again
            for param in module.parameters():
                kept.append((param.detach(), param.detach().clone()))

    result = train(tmp_path, GPT, streamed(), max_steps=8, callbacks=[Keep()])
    assert len(kept) == 8 * len(list(result.module.parameters()))
    assert all(torch.equal(view, value) for view, value in kept)
    kept.clear()


@pytest.mark.not_simulated(reason="it is given tensors of the CPU", only=["False"])
@pytest.mark.parametrize("streams", [True, False])
def test_views_kept_from_inside_a_step_show_one_step_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """Old values where the unit streams; where it is kept in memory the newest, as under plain Lightning."""
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            view = self.net.tok.weight.detach()
            kept.append((view, view.clone()))
            return super().training_step(batch, batch_idx)

    module = Keeping(GPT())
    if streams:
        choose_plan(monkeypatch, keep_cache=True, num_queued=1)
    trainer = make_trainer(tmp_path, streamed(host_memory="64MiB", window=9), max_steps=6)
    trainer.fit(module, DataLoader(Tokens(400), batch_size=4))
    if streams:
        assert all(torch.equal(view, value) for view, value in kept)
    else:
        assert all(torch.equal(view, module.net.tok.weight) for view, _ in kept)
    assert not torch.equal(kept[0][1], kept[5][1])
    kept.clear()
