"""Models that do what models seldom do, and still train."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import GPT


class Checkpointed(GPT):
    def __init__(self, use_reentrant: bool, inner: bool) -> None:
        super().__init__(tie=True, dropout=0.1)
        self._options, self._inner = {"use_reentrant": use_reentrant}, inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        for block in self.blocks:
            if self._inner:
                x = x + checkpoint(lambda y, b=block: b.down(F.gelu(b.up(y))), x, **self._options)
            else:
                x = checkpoint(block, x, **self._options)
        return self.head(self.norm(x))


class Wandering(GPT):
    """Unused parameters; order and choice of blocks change; a block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(32, 32)
        self._calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self._calls += 1
        order = ([0, 1, 2], [2, 0], [1], [1, 1, 0], [0, 2, 0])[self._calls % 5]
        x = self.tok(ids) + self.pos[: ids.shape[1]]
        for i in order:
            x = self.blocks[i](x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """torch's own transformer, with the fast path in eval, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(97, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.tok(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0])


class Hooked(GPT):
    """Forward and backward hooks of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
        self.blocks[1].register_forward_hook(lambda m, args, out: out + m.down.bias)
        self.blocks[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        self.blocks[2].up.weight.register_hook(lambda g: g * 2)
        self.head.register_forward_hook(lambda m, args, out: out * m.weight.norm())
