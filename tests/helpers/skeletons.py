"""Small models of each way in which architectures hold their blocks. All take tokens below 97 and return logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 24


class Block(nn.Module):
    """Two matrices and a norm, as a residual block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.downsample = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class Tower(nn.Module):
    """A whole model of its own, with a part of the head in it."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH)
        self.body = nn.Sequential(*(Block() for _ in range(depth)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))


class Skeleton(nn.Module):
    """An embedding, what a subclass adds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, WIDTH)
        self.head = nn.Linear(WIDTH, 97)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.tok(ids)))


class Stages(Skeleton):
    """Swin, ConvNeXt, ResNet; equal stages look like blocks themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(3) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class InDict(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": Block() for i in range(4)})

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Attributes(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"layer{i}", Block())

    def body(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(self, f"layer{i}")(x)
        return x


class ListOfModels(nn.ModuleList):
    """A list itself, which its module runs as an ensemble."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Tower(), nn.Linear(WIDTH, 97)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([model(ids) for model in self]).mean(0)


class OneOfAKind(Skeleton):
    """The first block has a parameter that the others use through it (T5), and one stands alone (a UNet's middle)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[0].bias = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.middle = Block()

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + self.blocks[0].bias)
        return self.middle(x)


class SharedBlock(Skeleton):
    """One block, applied many times (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([Block()])

    def body(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.groups[0](x)
        return x


class WithPart(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.own = Block()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.own(x))


class SharedPart(Skeleton):
    """Blocks with one module in common (Zamba), which is also the largest."""

    def __init__(self) -> None:
        super().__init__()
        part = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Linear(3 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList(WithPart(part) for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class FusedExperts(nn.Module):
    """All experts in two parameters of three dimensions."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num, 2 * WIDTH, WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(num, WIDTH, 2 * WIDTH) * 0.1)

    def expert(self, index: int, x: Tensor) -> Tensor:
        return (x @ self.up[index].T).tanh() @ self.down[index].T

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        return mix(lambda i, rows: self.expert(i, rows), x, chosen, weight)


def mix(expert: Callable[[int, Tensor], Tensor], x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """What the chosen expert of each row of ``x`` returns; experts that no row has chosen do not run."""
    out = torch.zeros_like(x)
    for index in chosen.unique().tolist():
        rows = (chosen == index).nonzero()[:, 0]
        out = out.index_add(0, rows, (weight[rows, None] * expert(index, x[rows])).to(out.dtype))
    return out


class MixtureBlock(nn.Module):
    """A residual block whose second half is a mixture. Of ``num`` experts the last gets no token ever."""

    def __init__(self, num: int = 7, fused: bool = False) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, num)
        self.experts = FusedExperts(num) if fused else nn.ModuleList(Expert() for _ in range(num))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x).tanh()
        flat = x.flatten(0, 1)
        weight, chosen = self.router(flat)[:, :-1].softmax(-1).max(-1)
        if isinstance(self.experts, FusedExperts):
            return x + self.experts(flat, chosen, weight).view_as(x)
        experts = self.experts
        return x + mix(lambda i, rows: experts[i](rows), flat, chosen, weight).view_as(x)


class Mixture(Skeleton):
    fused = False

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MixtureBlock(fused=self.fused) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class FusedMixture(Mixture):
    fused = True


class Parts(nn.Module):
    """What a block consists of, without a forward: the model calls the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.scale = nn.Parameter(torch.ones(WIDTH))


class NotCalled(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Parts() for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        for parts in self.layers:
            x = parts.out[0](parts.block(x)) * parts.scale
        return x


class StudentAndTeacher(Skeleton):
    """Two deep MLPs of one class, of which one is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = DeepMLP(), DeepMLP()
        self.teacher.requires_grad_(False)

    def body(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


class DeepMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Dense(nn.ModuleDict):
    """A list with a forward of its own, as DenseNet has: a stage."""

    def __init__(self) -> None:
        super().__init__({f"layer{i}": Block() for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


class DenseStages(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Dense(), nn.Linear(WIDTH, WIDTH), Dense())

    def body(self, x: Tensor) -> Tensor:
        return self.features(x)


class SequentialExperts(Mixture):
    """Experts without a class of their own, chosen by a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            experts = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(7))
            layer.experts = nn.ModuleList(experts)


class Functional(Skeleton):
    """Blocks whose parameters another module uses, and lists of parameters that no module runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + nn.functional.linear(x, block.up.weight).mean(-1, keepdim=True)
        for weight in self.extra:
            x = (x @ weight).tanh()
        return x


SKELETONS: list[type[nn.Module]] = [
    Stages, InDict, Attributes, ListOfModels, OneOfAKind, SharedBlock, SharedPart, Mixture, FusedMixture, Functional,
    NotCalled, StudentAndTeacher, DenseStages, SequentialExperts,
]  # fmt: skip
