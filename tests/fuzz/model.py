"""The net of a program."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.blocks import BLOCKS
from tests.fuzz.odd_blocks import CARRIES, Shared

if TYPE_CHECKING:
    from tests.fuzz.program import Program

VOCAB, TIME = 11, 4


class Net(nn.Module):
    """Embedding, blocks and head, put together as the program says."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        width = program.width
        self.embed = {
            "table": lambda: nn.Embedding(VOCAB, width),
            "max_norm": lambda: nn.Embedding(VOCAB, width, max_norm=1.5),
            "linear": lambda: nn.Linear(VOCAB, width, bias=False),
        }[program.embed]()
        common = nn.Linear(width, width)
        made = [self._make(name, common) for name in program.blocks]
        for i in program.frozen:
            if i < len(made):
                made[i].requires_grad_(False)
        self.num_blocks = len(made)
        self._hold(made)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self._tie(made)

    def _make(self, name: str, common: nn.Module) -> nn.Module:
        kind = BLOCKS[name]
        if kind is Shared:
            return kind(self.program.width, common)
        return kind(self.program.width)

    def _hold(self, made: list[nn.Module]) -> None:
        container = self.program.container
        if container == "list":
            self.blocks: Any = nn.ModuleList(made)
        elif container == "dict":
            self.blocks = nn.ModuleDict({f"block {i}": block for i, block in enumerate(made)})
        elif container == "sequential":
            self.blocks = nn.Sequential(*made)
        elif container == "nested":
            self.blocks = nn.ModuleList([nn.ModuleList(made[i : i + 2]) for i in range(0, len(made), 2)])
        else:
            for i, block in enumerate(made):
                self.add_module(f"block{i}", block)

    def each_block(self) -> list[nn.Module]:
        container = self.program.container
        if container == "dict":
            return list(self.blocks.values())
        if container == "attributes":
            return [getattr(self, f"block{i}") for i in range(self.num_blocks)]
        if container == "nested":
            return [block for part in self.blocks for block in part]
        return list(self.blocks)

    def _tie(self, made: list[nn.Module]) -> None:
        tie = self.program.tie
        if tie == "head" and self.program.embed != "linear":
            self.head.weight = self.embed.weight
        elif tie == "blocks":
            first = next((block for block in made if type(getattr(block, "up", None)) is nn.Linear), None)
            for block in made:
                up = getattr(block, "up", None)
                if first is not None and type(up) is nn.Linear and _is_plain(up) and _is_plain(first.up):
                    up.weight = first.up.weight
        elif tie == "norms":
            for block in made:
                if isinstance(getattr(block, "norm", None), nn.LayerNorm):
                    block.norm = self.norm

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what blocks want added to the loss."""
        hot = self.program.embed == "linear"
        x = self.embed(F.one_hot(ids, VOCAB).to(self.head.weight.dtype) if hot else ids)
        return self.after_embedding(x)

    def after_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        extra, carry = x.new_zeros(()), CARRIES[self.program.carry]()
        for _ in range(self.program.loops):
            for block in self.each_block():
                if self.program.layer_drop and self.training and random.random() < 0.3:
                    continue
                out = block(x * 1.0) if carry is None else block(x * 1.0, carry)
                if isinstance(out, tuple):
                    out, more = out
                    extra = extra + more
                x = out
        x = self.norm(x)
        if self.program.tie == "functional":
            weight = self.embed.weight
            return F.linear(x, weight.t() if self.program.embed == "linear" else weight), extra
        return self.head(x), extra


def _is_plain(module: nn.Linear) -> bool:
    """Its weight is a parameter, not computed from others."""
    return "weight" in module._parameters


def pairs(module: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of one shape, each with the next."""
    by_shape: dict[Any, list[nn.Parameter]] = {}
    for param in module.parameters():
        if param.dim() == 2 and param.numel():
            by_shape.setdefault(param.shape, []).append(param)
    return [pair for params in by_shape.values() for pair in itertools.pairwise(params)]


def real(module: nn.Module) -> list[nn.Parameter]:
    """Its parameters that have elements, and no imaginary part."""
    return [param for param in module.parameters() if param.numel() and not torch.is_complex(param)]
