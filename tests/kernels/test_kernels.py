"""Every level of the kernels gives the bits of the reference, and the reference those of torch.optim.

Lengths are chosen around the vector widths (4, 8, 16), the 4096 elements of a pass and the 16,384 of a block.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ssd.kernels import api as kernels
from lightning_ssd.kernels import reference
from lightning_ssd.kernels.options import AdamOptions, SGDOptions

NATIVE = kernels._native
LEVELS = NATIVE.kernel_levels() if NATIVE is not None else []
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SPECIALS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e-39, 3.4e38, 1.2e-38, 65519.0, 65520.0)
BLOCK = 16_384
IS_INTELS = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
SLOW_FIXTURE = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["reference", *LEVELS])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once on each level of this CPU, and once without the native module."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "_native", None)
        yield request.param
        return
    before = NATIVE.kernel_level()
    NATIVE.set_kernel_level(request.param)
    yield request.param
    NATIVE.set_kernel_level(before)


def bits(t: Tensor) -> Tensor:
    """Bits as integers; all NaNs alike, because which of two NaNs an instruction passes on is not fixed."""
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(
        torch.int32 if t.dtype == torch.float32 else torch.int16
    )


def same_bits(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(bits(a), bits(b))) for a, b in pairs)


def random_tensors(numel: int, seed: int, *, specials: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, scale in (("param", 1.0), ("grad", 0.3), ("exp_avg", 0.1), ("exp_avg_sq", 0.1)):
        made[name] = torch.randn(numel, generator=generator) * scale
        if specials and numel:
            where = torch.randperm(numel, generator=generator)[: max(1, numel // 7)]
            which = torch.randint(len(SPECIALS), (len(where),), generator=generator)
            made[name][where] = torch.tensor(SPECIALS)[which]
    made["exp_avg_sq"].abs_().square_()
    return made


def shifted(t: Tensor, by: int) -> Tensor:
    """A copy that starts ``by`` elements into its memory: aligned to an element, not to a vector."""
    room = torch.empty(t.numel() + by, dtype=t.dtype)
    room[by:] = t
    return room[by:]


adam_options = st.fixed_dictionaries(
    {
        "step": st.integers(1, 10_000),
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "betas": st.sampled_from([(0.9, 0.999), (0.3, 0.95), (0.0, 0.0), (0.5, 0.5)]),
        "eps": st.sampled_from([1e-8, 0.0, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
        "grad_scale": st.sampled_from([1.0, 0.37, 1 / 65536]),
    }
)
sgd_options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1]),
        "momentum_factor": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "maximize": st.booleans(),
        "first_step": st.booleans(),
        "grad_scale": st.sampled_from([1.0, 0.37]),
    }
)
operands = st.fixed_dictionaries(
    {
        "numel": st.one_of(st.integers(0, 70), st.integers(1000, 1100), st.integers(BLOCK - 20, 2 * BLOCK + 20)),
        "shift": st.integers(0, 3),
        "grad_dtype": st.sampled_from(DTYPES),
        "out_dtype": st.sampled_from([None, *DTYPES]),
        "specials": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


@SLOW_FIXTURE
@given(case=operands, options=adam_options)
def test_adam_equals_the_reference(level: str, case: dict[str, Any], options: dict[str, Any]) -> None:
    if not kernels.is_bit_equal_to_torch():
        pytest.skip("torch rounds in another way on this machine")
    made = random_tensors(case["numel"], case["seed"], specials=case["specials"])
    grad = shifted(made["grad"].to(case["grad_dtype"]), case["shift"])
    results = []
    for adam in (kernels.adam_, reference.adam_):
        states = [shifted(made[kind], case["shift"]) for kind in ("param", "exp_avg", "exp_avg_sq")]
        out = case["out_dtype"] and shifted(torch.zeros(case["numel"], dtype=case["out_dtype"]), case["shift"])
        adam(states[0], grad, states[1], states[2], AdamOptions(**options), out=out)
        if options["betas"][0] == 0:  # in torch the sign of a zero average, so of a zero, then depends on the position
            states = [state.add_(0.0) for state in states]
            out = out if out is None else out.add_(0.0)
        results.append([*states, out])
    assert same_bits(*results)


@SLOW_FIXTURE
@given(case=operands, options=sgd_options)
def test_sgd_equals_the_reference(level: str, case: dict[str, Any], options: dict[str, Any]) -> None:
    if not kernels.is_bit_equal_to_torch():
        pytest.skip("torch rounds in another way on this machine")
    made = random_tensors(case["numel"], case["seed"], specials=case["specials"])
    grad = shifted(made["grad"].to(case["grad_dtype"]), case["shift"])
    results = []
    for sgd in (kernels.sgd_, reference.sgd_):
        param = shifted(made["param"], case["shift"])
        momentum = shifted(made["exp_avg"], case["shift"]) if options["momentum_factor"] else None
        out = case["out_dtype"] and shifted(torch.zeros(case["numel"], dtype=case["out_dtype"]), case["shift"])
        sgd(param, grad, momentum, SGDOptions(**options), out=out)
        results.append([param, momentum, out])
    assert same_bits(*results)


@pytest.mark.parametrize(
    ("make", "decoupled"),
    [
        (lambda p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1, foreach=False), True),
        (lambda p: torch.optim.Adam([p], lr=1e-2, foreach=False), False),
        (lambda p: torch.optim.Adam([p], lr=1e-2, weight_decay=0.1, maximize=True, foreach=False), False),
        (lambda p: torch.optim.AdamW([p], lr=1e-2, betas=(0.4, 0.9), eps=1e-4, foreach=False), True),
    ],
    ids=["adamw", "adam", "adam-l2-maximize", "adamw-small-beta"],
)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (131, 257)])
def test_adam_steps_equal_torch_optim(level: str, make: Any, decoupled: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    theirs = torch.randn(shape, requires_grad=True)
    ours, exp_avg, exp_avg_sq = (
        theirs.detach().flatten().clone(),
        torch.zeros(theirs.numel()),
        torch.zeros(theirs.numel()),
    )
    optimizer = make(theirs)
    group = optimizer.param_groups[0]
    for step in range(1, 8):
        theirs.grad = torch.randn(shape) * 10.0 ** (step - 4)
        optimizer.step()
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
        kernels.adam_(
            ours, theirs.grad.flatten(), exp_avg, exp_avg_sq, AdamOptions(step, decoupled=decoupled, **options)
        )
        state = optimizer.state[theirs]
        pairs = ((ours, theirs), (exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"]))
        _assert_torch(pairs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
    ],
    ids=["plain", "l2", "momentum", "nesterov"],
)
def test_sgd_steps_equal_torch_optim(level: str, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    theirs = torch.randn(131, 257, requires_grad=True)
    ours, momentum = theirs.detach().flatten().clone(), torch.zeros(theirs.numel()) if "momentum" in options else None
    optimizer = torch.optim.SGD([theirs], lr=0.05, foreach=False, **options)
    group = optimizer.param_groups[0]
    for step in range(1, 6):
        theirs.grad = torch.randn(theirs.shape)
        optimizer.step()
        kernels.sgd_(
            ours,
            theirs.grad.flatten(),
            momentum,
            SGDOptions(
                momentum_factor=group["momentum"],
                first_step=step == 1,
                **{name: group[name] for name in ("lr", "dampening", "nesterov", "weight_decay", "maximize")},
            ),
        )
        _assert_torch([(ours, theirs)])


def _assert_torch(pairs: Any) -> None:
    for ours, theirs in pairs:
        if kernels.is_bit_equal_to_torch():
            assert torch.equal(bits(ours), bits(theirs.detach().flatten()))
        else:
            torch.testing.assert_close(ours, theirs.detach().flatten())


ADAMW = AdamOptions(step=3, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled=True)


@SLOW_FIXTURE
@given(cuts=st.lists(st.integers(0, 5000), max_size=5), seed=st.integers(0, 100))
def test_pieces_of_a_tensor_give_the_bits_of_the_whole(level: str, cuts: list[int], seed: int) -> None:
    whole, pieces = (list(random_tensors(5000, seed).values()) for _ in range(2))
    out, out_of_pieces = torch.zeros(5000, dtype=torch.bfloat16), torch.zeros(5000, dtype=torch.bfloat16)
    kernels.adam_(*whole, ADAMW, out=out)
    for begin, end in itertools.pairwise([0, *sorted(cuts), 5000]):
        kernels.adam_(*(t[begin:end] for t in pieces), ADAMW, out=out_of_pieces[begin:end])
    assert same_bits([*whole, out], [*pieces, out_of_pieces])


@pytest.mark.skipif(NATIVE is None, reason="needs the native module")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    numel = 7 * BLOCK + 13
    before = NATIVE.num_kernel_threads()
    results = []
    for num_threads in (1, 2, 3, 8):
        NATIVE.set_num_kernel_threads(num_threads)
        made = list(random_tensors(numel, 5).values())
        out = torch.zeros(numel, dtype=torch.float16)
        kernels.adam_(*made, ADAMW, out=out)
        total = torch.tensor([kernels.sum_of_squares(made[1])[0]], dtype=torch.float64)
        results.append([*made, out, total.view(torch.float32)])
        assert f"{num_threads} threads" in kernels.describe()
    NATIVE.set_num_kernel_threads(before)
    for other in results[1:]:
        assert same_bits(results[0], other)


@pytest.mark.skipif(NATIVE is None, reason="needs the native module")
def test_a_foreign_square_root_gives_the_same_bits(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "reference":
        pytest.skip("takes torch's own")
    _, address, set_threads = kernels.torch_sqrt()
    if not address:
        pytest.skip("this torch has no square root of its own")
    assert set_threads, "MKL, which the root is from, must be told not to start threads"
    made, again = (list(random_tensors(2 * BLOCK + 5, 6, specials=True).values()) for _ in range(2))
    kernels.adam_(*made, ADAMW)
    monkeypatch.setattr(kernels, "torch_sqrt", lambda: (NATIVE.SqrtForm.external, address, set_threads))
    kernels.adam_(*again, ADAMW)
    assert same_bits(made, again)


@pytest.mark.skipif(not LEVELS or "avx2" not in LEVELS, reason="needs the native module on a CPU with AVX2")
def test_no_square_root_of_torchs_has_to_be_called() -> None:
    assert kernels.torch_sqrt()[0] is not NATIVE.SqrtForm.external


@pytest.mark.skipif("avx512" not in LEVELS or not IS_INTELS, reason="MKL takes all three on no other CPUs")
@pytest.mark.parametrize(
    ("instructions", "form"), [("SSE4_2", "mkl_sse"), ("AVX2", "mkl_avx2"), ("AVX512", "mkl_avx512")]
)
def test_each_square_root_of_mkl_has_a_form(instructions: str, form: str) -> None:
    code = (
        "from lightning_ssd.kernels import api as kernels;"
        "print(kernels.torch_sqrt()[0].name, kernels.is_bit_equal_to_torch())"
    )
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [form, "True"]


@pytest.mark.skipif(not LEVELS or "avx2" not in LEVELS, reason="needs the native module on a CPU with AVX2")
@pytest.mark.parametrize(("capability", "equal"), [("avx2", True), ("default", False)])
def test_the_self_check_tells_how_torch_rounds(capability: str, equal: bool) -> None:
    code = "from lightning_ssd.kernels import api as kernels; print(kernels.is_bit_equal_to_torch())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(equal)
