"""Models and steps that `tests/strategy/test_habits.py` trains, each with a habit that only some projects have."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.helpers.compatibility_modules import WIDTH, Manual, Net

# ---------------------------------------------------------------------------------------------------------- models


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Sequential(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH))
        self.first, self.last = parametrizations.weight_norm(self.first), parametrizations.spectral_norm(self.last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.more(x))


class NormHooks(Net):
    """The older form: a hook before the forward computes the weight, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.utils.weight_norm(self.first), nn.utils.spectral_norm(self.last)


class Tied(Net):
    """One parameter under two names, one module under three, and a weight that is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.again = nn.Linear(WIDTH, WIDTH), self.first
        self.tied.weight, self.third = self.first.weight, nn.ModuleDict({"x": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.linear(self.third["x"](self.tied(x)) + self.again(x), self.first.weight.t()))


class Embeds(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(20, WIDTH, max_norm=1.0, padding_idx=0), nn.EmbeddingBag(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 5).long().clamp(max=19)
        return super().forward(x + self.table(ids[:, 0]) + self.bag(ids))


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        several = x[:, None].expand(-1, 3, -1)
        packed = nn.utils.rnn.pack_padded_sequence(several, torch.full((len(x),), 3), batch_first=True)
        return super().forward(self.cell(self.rnn(packed)[1][0][-1], self.rnn(several)[0][:, -1]))


class Attends(Net):
    """The layer's fast path in evaluation and the attention read weights of modules that they do not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True), 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        several = x[:, None].repeat(1, 3, 1)
        is_padding = torch.tensor([[False, False, True]]).expand(len(x), -1)
        y = self.layers(several, src_key_padding_mask=is_padding)
        return super().forward(self.attention(y, several, several, need_weights=False)[0][:, 0])


class Convolves(Net):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.convs(x.view(-1, 3, 1, 2)).reshape(-1, WIDTH))


class MadeInSetup(Net):
    """A lazy module gets its shape, and a head is made, when the data is known."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(WIDTH)

    def setup(self, stage: str) -> None:
        self.first(torch.zeros(1, WIDTH))
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.extra(super().forward(x))
        return y


class FakeQuantized(Net):
    def __init__(self) -> None:
        super().__init__()
        from torch.ao import quantization

        self.net = nn.Sequential(
            quantization.QuantStub(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), quantization.DeQuantStub()
        )
        self.net.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
        quantization.prepare_qat(self.net.train(), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.net(x))


class Traced(Net):
    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.first = torch.fx.symbolic_trace(net)  # type: ignore[assignment]


class Checkpoints(Net):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(lambda z: self.norm(self.first(z)).tanh(), x, use_reentrant=False)
        return self.last(y)


@dataclasses.dataclass
class Output:
    hidden: Tensor
    extra: Any


class Odd(nn.Module):
    """Takes keywords, returns an object, works in place, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)
        self.seen: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, *, number: int) -> Output:
        y, self.calls = self.relu(self.linear(x)), self.calls + 1
        if self.seen is not None:
            y = y + 0.1 * self.seen
        if self.training:
            self.seen = y.detach().mean(0)
        return Output(y, {"given": [x, number]})


class OddBlocks(Net):
    """Some are skipped by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Odd() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if not self.training or torch.rand(()) > 0.3:
                output = block(x, number=number)
                x = output.hidden + output.extra["given"][0]
        return super().forward(x)


class Inner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Nested(Net):
    """A LightningModule inside, a wrapper that passes attributes on, and a part that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused, self.first = Inner(), nn.Linear(WIDTH, WIDTH), nn.DataParallel(self.first)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


class Frozen(Net):
    """A backbone in evaluation without gradients, a teacher in a list, another that is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).requires_grad_(False)
        self.others = [nn.Linear(WIDTH, WIDTH)]

    def on_fit_start(self) -> None:
        object.__setattr__(self, "teacher", copy.deepcopy(self.first))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone.eval()(x) + self.others[0](x)
        return super().forward(x + self.teacher(x).detach())


class Params(Net):
    """Of every form, in the module itself, lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3))
        self.many, self.named = nn.ParameterList([torch.ones(WIDTH)]), nn.ParameterDict({"a": torch.zeros(WIDTH)})
        self.turn = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.number = nn.Parameter(torch.arange(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale * self.many[0] + self.named["a"] * self.number + self.empty.sum()
        return super().forward((x * self.turn).abs())


class Dtypes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.double()
        self.last.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x.double()).float()).tanh()
        return self.last(y.bfloat16()).float()


class Direct(Net):
    """Weights are used without their modules: by functions, sliced, functionally, and by an autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,), self.norm.weight, self.norm.bias) * self.first.weight[0] + self.first.bias[:1]
        z = torch.func.functional_call(self.last, dict(self.last.named_parameters()), (y,))
        return super().forward(Product.apply(x, self.first.weight)) + z


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Counts(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3, "seen": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        assert state["calls"] == 3


class Buffers(Net):
    """A queue, a counter, one that is not saved, state that is no tensor, and metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Counts(WIDTH, WIDTH)
        self.register_buffer("queue", torch.zeros(4, WIDTH))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("temporary", torch.zeros(1), persistent=False)
        self.metrics = torchmetrics.MetricCollection(torchmetrics.MeanSquaredError(), prefix="train_")

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.queue[int(self.place) % 4] = batch[0]
        self.place += 1
        self.temporary = self.temporary + 1
        self.metrics(self(batch)[:, 0], batch.sum(1))
        self.log_dict(self.metrics, on_epoch=True)
        return super().training_step(batch + self.queue.mean(0) + self.temporary + random.random(), batch_idx)


class LossWithWeights(Net):
    """A parameter in the loss, a penalty over all parameters, one by singular values; a skipped batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def on_fit_start(self) -> None:
        self.initial = [param.detach().clone() for param in self.parameters()]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("weight", self.weight)
        loss = super().training_step(batch, batch_idx) * torch.exp(-self.weight) + self.weight
        pairs = zip(self.parameters(), self.initial, strict=True)
        loss = loss + 0.1 * torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
        loss = loss.double() + torch.linalg.svdvals(self.first.weight).sum()
        return None if batch_idx == 2 else loss


# ----------------------------------------------------------------------------------------------------------- steps


class TogglesAndAccumulates(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.manual_backward(loss / 2, retain_graph=True)
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss)


class OneManual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesTurns(OneManual):
    """Weights go up along the gradient and back, gradients of two losses are joined; a scheduler is stepped."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer, params = self.optimizers(), list(self.parameters())
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        moves = [0.05 * param.grad for param in params]
        for param, move in zip(params, moves, strict=True):
            param.data.add_(move)
        losses = self.loss(batch), self(batch).square().mean()
        one, other = (torch.autograd.grad(loss, params) for loss in losses)
        for param, move in zip(params, moves, strict=True):
            param.data.sub_(move)
        for param, a, b in zip(params, one, other, strict=True):
            param.grad = a + b * (1 if float((a * b).sum()) > 0 else 0.5)
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.02)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)]
