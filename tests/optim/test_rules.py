"""Each rule by itself: the numbers of the torch class, parameter by parameter, over several steps.

A rule that is added to `NATIVE_RULES` is tested here without a further line, but for its settings in `OPTIONS`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssd.errors import SSDOffloadError
from lightning_ssd.optim.rules import NATIVE_RULES, Rule, TorchRule
from lightning_ssd.optim.whole import WholeRule
from tests.helpers.optimizers import OPTIONS

STEPS = 5
NATIVE = [(cls, options) for cls in NATIVE_RULES for options in OPTIONS.get(cls, [{}])]
ALL = [(cls, options) for cls, several in OPTIONS.items() for options in several]


def make(cls: type[Optimizer], options: dict[str, Any]) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (7, 1))]
    optimizer = cls(params, **options)
    optimizer.param_groups[0].update({key: False for key in ("foreach",) if key in optimizer.defaults})
    return optimizer


def grads(step: int, param: Tensor) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + param.numel()))


class ByRule:
    """The same parameters, updated by a rule."""

    def __init__(self, rule: Rule, optimizer: Optimizer) -> None:
        self.rule = rule
        (group,) = optimizer.param_groups
        self.params = [param.detach().clone() for param in group["params"]]
        self.options = {key: value for key, value in group.items() if key != "params"}
        self.scalars: list[dict[str, Any]] = [{} for _ in self.params]
        kinds = rule.kinds(self.options) if rule.is_elementwise else ()
        self.states = [{kind: torch.zeros_like(p) for kind in kinds} for p in self.params]
        self.has_state = bool(optimizer.state)
        # Adagrad makes its state when it is made; a run takes that over.
        for param, states, scalars in zip(group["params"], self.states, self.scalars, strict=True):
            for key, value in optimizer.state[param].items():
                (states if value.shape == param.shape else scalars)[key] = value.clone()

    def step(self, number: int) -> None:
        is_first = number == 0 and not self.has_state
        for param, states, scalars in zip(self.params, self.states, self.scalars, strict=True):
            grad = grads(number, param)
            self.rule.begin(scalars, self.options)
            if self.rule.is_elementwise:  # in pieces, as chunks cut it
                for piece in (slice(0, 3), slice(3, None)):
                    mine = {kind: state.view(-1)[piece] for kind, state in states.items()}
                    flat = param.view(-1)[piece], grad.view(-1)[piece]
                    self.rule.update(*flat, mine, scalars, self.options, is_first=is_first)
            else:
                self.rule.update(param, grad, states, scalars, self.options, is_first=is_first)

    def state(self, index: int) -> dict[str, Any]:
        return {**self.scalars[index], **self.states[index]}


def run(rule: Rule, optimizer: Optimizer, *, rtol: float, atol: float) -> None:
    ours = ByRule(rule, optimizer)
    params = optimizer.param_groups[0]["params"]
    for number in range(STEPS):
        for param in params:
            param.grad = grads(number, param)
        optimizer.step()
        ours.step(number)
    for index, param in enumerate(params):
        torch.testing.assert_close(ours.params[index], param.detach(), rtol=rtol, atol=atol)
        expected = {k: v for k, v in optimizer.state[param].items() if v is not None}
        assert ours.state(index).keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours.state(index)[key], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("cls", "options"), NATIVE)
def test_a_native_rule_has_the_numbers_of_its_class(cls: type[Optimizer], options: dict[str, Any]) -> None:
    rule = NATIVE_RULES[cls]()
    rtol, atol = (2e-6, 1e-7) if rule.has_kernel else (0.0, 0.0)  # torch's own operations have its bits
    run(rule, make(cls, options), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_a_class_by_itself_has_its_own_bits(cls: type[Optimizer], options: dict[str, Any]) -> None:
    run(TorchRule(make(cls, options)), make(cls, options), rtol=0, atol=0)


@pytest.mark.parametrize("cls", NATIVE_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_native_rule_rounds_the_master_in_the_same_pass(cls: type[Optimizer], dtype: torch.dtype) -> None:
    rule, master, out = NATIVE_RULES[cls](), torch.randn(64), torch.zeros(64, dtype=dtype)
    options = {key: value for key, value in make(cls, OPTIONS[cls][0]).param_groups[0].items() if key != "params"}
    scalars: dict[str, Any] = {}
    rule.begin(scalars, options)
    states = {kind: torch.zeros(64) for kind in rule.kinds(options)}
    rule.update(master, torch.randn(64), states, scalars, options, is_first=True, out=out)
    assert torch.equal(out, master.to(dtype))


@pytest.mark.parametrize(("cls", "options"), NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_native_rule_reads_a_gradient_of_any_dtype_exactly_and_leaves_it(
    cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    rule = NATIVE_RULES[cls]()
    hyper = {key: value for key, value in make(cls, options).param_groups[0].items() if key != "params"}
    narrow = [torch.randn(64).to(dtype) for _ in range(3)]
    ends = []
    for grads in ([grad.clone() for grad in narrow], [grad.float() for grad in narrow]):
        param, scalars = torch.linspace(-1, 1, 64), dict[str, Any]()
        states = {kind: torch.zeros(64) for kind in rule.kinds(hyper)}
        for number, grad in enumerate(grads):
            kept = grad.clone()
            rule.begin(scalars, hyper)
            rule.update(param, grad, states, scalars, hyper, is_first=number == 0)
            assert torch.equal(grad, kept)
        ends.append([param, *states.values()])
    assert all(map(torch.equal, *ends))


class Counter(Optimizer):
    """Leaves another value after each update."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.num_updates = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_updates = self.num_updates + int(self.param_groups[0]["params"][0].numel())


def test_attributes_that_a_class_sets_are_taken_over_once_a_step() -> None:
    optimizer = Counter([nn.Parameter(torch.zeros(2))])
    rule = TorchRule(optimizer)
    for _ in range(2):
        rule.update(torch.zeros(3), torch.zeros(3), {}, {}, {"lr": 0.1}, is_first=True)
    assert optimizer.num_updates == 0
    rule.finish()
    assert optimizer.num_updates == 3  # as if both had been updated in one step
    for numel in (2, 3):
        rule.update(torch.zeros(numel), torch.zeros(numel), {}, {}, {"lr": 0.1}, is_first=False)
    with pytest.raises(SSDOffloadError, match=r"Counter\.num_updates has another value"):
        rule.finish()


def test_one_that_runs_whole_updates_no_single_parameter() -> None:
    rule = WholeRule("it mixes parameters", 2.0)
    assert rule.kinds({}) == ()
    with pytest.raises(NotImplementedError, match="WholeRule"):
        rule.update(torch.zeros(1), torch.zeros(1), {}, {}, {}, is_first=True)
