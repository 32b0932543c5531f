"""All blocks, by name."""

from __future__ import annotations

from torch import nn

from tests.fuzz import odd_blocks as odd
from tests.fuzz import plain_blocks as plain

BLOCKS: dict[str, type[nn.Module]] = {
    name: kind
    for module in (plain, odd)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__
}
