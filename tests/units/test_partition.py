"""Cutting models into units: every parameter in one unit, each unit of one dtype and all frozen or all trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_ssd.cut.largest import remark
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.units.model_units import chains
from lightning_ssd.units.partition import UnitSpec, partition
from lightning_ssd.units.unit import Unit
from tests.helpers import skeletons
from tests.helpers.models import GPT, ConvNet, FunctionalTie, ViT


class Nested(nn.Module):
    """Blocks in lists in a list, beside one odd block."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
            for _ in range(2)
        )
        self.odd = nn.Linear(4, 2)


class Shared(nn.Module):
    """One module under two names, and one parameter in two modules of different blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.again = self.blocks[1]
        self.blocks[2].bias = self.blocks[0].bias


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.out = nn.Linear(8, 2)


def frozen() -> nn.Module:
    net = GPT()
    net.blocks[0].requires_grad_(False)
    net.blocks[1].up.requires_grad_(False)
    net.tok.requires_grad_(False)
    return net


def mixed() -> nn.Module:
    net = GPT()
    net.blocks[0].norm1.to(torch.float64)
    net.head.to(torch.bfloat16)
    return net


def names(specs: list[UnitSpec]) -> list[str]:
    return [spec.name for spec in specs]


GPT_UNITS = ["root", "tok", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (GPT, GPT_UNITS),
        (lambda: GPT(tie=True), GPT_UNITS[:-1]),
        (FunctionalTie, GPT_UNITS[:-1]),
        (ViT, ["root", "patch", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]),
        (ConvNet, ["stem", "bn", "blocks.0", "blocks.1", "blocks.2", "fc"]),
        (Nested, [f"stages.{i}.{j}.{k}" for i in (0, 1) for j in (0, 1) for k in (0, 2)] + ["odd"]),
        (Shared, ["blocks.0", "blocks.1", "blocks.2"]),
        (Attention, ["attention", "layer", "out"]),
        (
            frozen,
            ["root", "tok+frozen", "blocks.0+frozen", "blocks.1", "blocks.1+frozen", "blocks.2", "norm", "head"],
        ),
        (mixed, ["root", "tok", "blocks.0+float64", "blocks.0+float32", "blocks.1", "blocks.2", "norm", "head"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0", "1"]),  # unlike: no blocks, but large enough
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_parameter_is_in_one_unit(make: Callable[[], nn.Module], expected: list[str]) -> None:
    net = make()
    specs = partition(net, min_numel=0)
    assert names(specs) == expected
    device_copy = [param for spec in specs for param in spec.params]
    assert len(device_copy) == len(set(device_copy))
    assert set(device_copy) == set(net.parameters())
    full_names = dict(net.named_parameters())
    for spec in specs:
        assert [full_names[name] for name in spec.names] == spec.params
        assert len({(param.dtype, param.requires_grad) for param in spec.params}) == 1


def test_small_leftovers_are_one_persistent_unit() -> None:
    specs = partition(GPT(), min_numel=3000)
    assert names(specs) == ["tok", "blocks.0", "blocks.1", "blocks.2", "head", "rest"]
    assert specs[-1].names == ["pos", "norm.weight", "norm.bias"]
    assert [spec.persistent for spec in specs] == [False] * 5 + [True]


def test_every_module_that_uses_a_parameter_loads_its_unit() -> None:
    net = GPT(tie=True)
    by_name = {spec.name: spec for spec in partition(net, min_numel=0)}
    assert set(by_name["tok"].modules) == {net.tok, net.head}
    shared = Shared()
    by_name = {spec.name: spec for spec in partition(shared, min_numel=0)}
    assert set(by_name["blocks.0"].modules) == {shared.blocks[0], shared.blocks[2]}
    assert by_name["blocks.1"].modules == [shared.blocks[1]]
    attention = Attention()  # reads parameters of children that it does not call
    assert partition(attention, min_numel=0)[0].modules == [attention.attention]


def test_chains_are_what_nested_modules_hold_at_once() -> None:
    net = frozen()
    units = [Unit(spec) for spec in partition(net, min_numel=0)]
    found = chains(net, units)
    assert ["root", "blocks.1", "blocks.1+frozen"] in found
    assert ["root", "tok+frozen"] in found


CUTS: dict[type[nn.Module], str] = {
    skeletons.Stages: "tok head stages.{0-1}.blocks.{0-2} stages.{0-1}.downsample",
    skeletons.InDict: "tok head layers.layer{0-3}",
    skeletons.Attributes: "tok head layer{0-3}",
    skeletons.ListOfModels: "{0-1}.0.embed {0-1}.0.body.{0-2} {0-1}.1",
    skeletons.OneOfAKind: "tok head blocks.{0-2} middle",
    skeletons.SharedBlock: "tok head groups.0",
    skeletons.SharedPart: "tok head blocks.{0-2} blocks.0.part",
    skeletons.Mixture: "tok head layers.{0-1} layers.{0-1}.experts.{0-6}",
    skeletons.FusedMixture: "tok head layers.{0-1} layers.{0-1}.experts",
    skeletons.Functional: "tok head blocks.{0-2} extra",
    skeletons.NotCalled: "tok head layers.{0-2}",
    skeletons.StudentAndTeacher: "tok head student.layers.0 student.layers.2 student.layers.4 "
    "student.layers.6 teacher.layers.0+frozen teacher.layers.2+frozen teacher.layers.4+frozen teacher.layers.6+frozen",
    skeletons.DenseStages: "tok head features.0.layer{0-2} features.1 features.2.layer{0-2}",
    skeletons.SequentialExperts: "tok head layers.{0-1} layers.{0-1}.experts.{0-6}",
}


def expanded(pattern: str) -> list[str]:
    """``"a.{0-2}"`` is ``["a.0", "a.1", "a.2"]``."""
    head, brace, tail = pattern.partition("{")
    if not brace:
        return [head]
    low, high = tail[: tail.index("}")].split("-")
    ends = expanded(tail[tail.index("}") + 1 :])
    return [f"{head}{i}{end}" for i in range(int(low), int(high) + 1) for end in ends]


@pytest.mark.parametrize(("skeleton", "expected"), CUTS.items(), ids=[cls.__name__ for cls in CUTS])
def test_the_cut_finds_the_blocks(skeleton: type[nn.Module], expected: str) -> None:
    specs = partition(skeleton(), min_numel=0)
    assert sorted(names(specs)) == sorted(name for pattern in expected.split() for name in expanded(pattern))
    assert names(specs) == names(partition(skeleton(), min_numel=0))  # whatever the values
    blocks = [spec for spec in specs if spec.block is not None]
    assert len({spec.block for spec in blocks}) == len({spec.block for spec in specs} - {None}) > 0
    assert {type(spec.block).__name__ for spec in blocks} <= {"Block", "MixtureBlock", "WithPart", "Linear", "Parts"}


def test_experts_are_fetched_inside_of_their_block() -> None:
    net = skeletons.Mixture()
    by_name = {spec.name: spec for spec in partition(net, min_numel=0)}
    assert by_name["layers.1.experts.2"].modules == [net.layers[1].experts[2]]
    assert by_name["layers.1.experts.2"].block is None
    fused = skeletons.FusedMixture()
    by_name = {spec.name: spec for spec in partition(fused, min_numel=0)}
    assert by_name["layers.1.experts"].modules == [fused.layers[1]]  # with its block: it is read once less
    # Small experts are fetched together, and tiny ones with their block.
    found = names(partition(net, min_numel=5000))
    assert [name for name in found if name.startswith("layers.0")] == [
        "layers.0", "layers.0.experts.0-2", "layers.0.experts.3-5", "layers.0.experts.6",
    ]  # fmt: skip
    assert [name for name in names(partition(net, min_numel=10**6)) if name.startswith("layers")] == [
        "layers.0",
        "layers.1",
    ]


def test_the_parts_of_a_block_without_a_forward_fetch_its_unit() -> None:
    net = skeletons.NotCalled()
    layer = net.layers[1]
    spec = next(spec for spec in partition(net, min_numel=0) if spec.name == "layers.1")
    assert spec.modules == [layer.block, layer.out[0], layer]  # the last for what it has itself


def test_the_rest_has_a_bound() -> None:
    net = nn.ModuleDict(
        {f"part {i}": nn.ModuleDict({"norm": nn.LayerNorm(8), "out": nn.Linear(8, i + 1)}) for i in range(40)}
    )
    specs = partition(net, min_numel=500)
    numel = {spec.name: sum(param.numel() for param in spec.params) for spec in specs}
    assert numel["rest"] <= 4 * 500
    assert all(500 <= numel[spec.name] < 1000 and not spec.persistent for spec in specs[:-1])
    assert sum(numel.values()) == sum(param.numel() for param in net.parameters())


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (
            {"tok": (5000, 10)},
            "unit 'u' is 50 times the median unit: 'tok' [5000, 10] is one tensor, which is not split",
        ),
        (
            {"up": (10, 100, 40), "down": (10, 40, 100)},
            "'up' [10, 100, 40] is fused, and one tensor is not split; where",
        ),
        ({f"w{i}": (100, 100) for i in range(9)}, "name classes of smaller modules inside of it too in units=[...]"),
        ({"w": (39, 100)}, ""),
    ],
)
def test_the_largest_unit_is_remarked_upon(shapes: dict[str, tuple[int, ...]], expected: str) -> None:
    found = remark("u", shapes, [1000, 900, 1000, 1100, 10**6], min_numel=10)
    assert expected in found
    assert bool(found) == bool(expected)
    assert remark("u", shapes, [1000], min_numel=10**6) == ""


def test_what_is_named_inside_of_what_is_named_is_fetched_by_itself() -> None:
    found = names(partition(GPT(), policy=["Block", "Linear"], min_numel=10**9))
    assert found[:5] == ["blocks.0", "blocks.0.down", "blocks.0.up", "blocks.0.out", "blocks.0.qkv"]


def test_a_policy_names_classes_or_decides() -> None:
    assert names(partition(GPT(), policy=["Linear"], min_numel=10**9))[:3] == [
        "blocks.0.qkv",
        "blocks.0.out",
        "blocks.0.up",
    ]
    assert names(partition(GPT(), policy="GPT", min_numel=10**9)) == ["root"]
    chosen = partition(GPT(), policy=lambda name, module: name == "blocks.1", min_numel=10**9)
    assert names(chosen) == ["blocks.1", "rest"]
    with pytest.raises(ConfigurationError, match=r"class\(es\) \['Blok'\], the model has none of them; it has: Block"):
        partition(GPT(), policy=["Blok", "Block"])


def test_units_have_names_of_their_own() -> None:
    """A module may be called as the leftovers are, or as a part of another: their files are found by name."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.root = nn.Linear(4, 4, bias=False)
            self.rest = nn.Linear(4, 4)
            self.body = nn.Linear(4, 4)
            self.body.bias.requires_grad_(False)
            self.add_module("body+frozen", nn.Linear(4, 4))
            self.add_module("root+2", nn.Linear(4, 4))
            self.small = nn.Linear(2, 2)

    found = names(partition(Odd(), min_numel=16))
    assert found == ["root", "root+3", "rest", "body", "body+frozen", "body+frozen+2", "root+2", "rest+2"]


def test_a_dtype_that_no_file_holds_is_refused_by_name() -> None:
    net = nn.Linear(2, 2)
    net.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ConfigurationError, match=r"parameter 'phase' is torch.complex128, .*view_as_complex"):
        partition(net)


def test_parameters_with_gaps_are_refused() -> None:
    for values in (torch.randn(3, 8)[:, ::2], torch.randn(1, 4).expand(3, 4)):
        module = nn.Linear(4, 3)
        module.weight = nn.Parameter(values)
        with pytest.raises(ConfigurationError, match=r"'weight' .* is a part of a larger tensor.*contiguous\(\)"):
            partition(module)
    transposed = nn.Linear(3, 4)
    transposed.weight = nn.Parameter(torch.randn(3, 4).t())
    for module in (transposed, nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)):
        assert names(partition(module, min_numel=0)) == ["root"]
