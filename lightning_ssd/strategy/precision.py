"""The precision plugin: Lightning's own plugin inside; parameters get their dtype as they are written to the store."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.strategy.lightning_classes import PrecisionBase

_TRUE_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_SUPPORTED = ("32-true", "bf16-mixed", "16-mixed", *_TRUE_DTYPES)


def by_name(*classes: type) -> Mapping[str, Any]:
    """Lightning's own precision classes, by name."""
    return MappingProxyType({cls.__name__: cls for cls in classes})


def _stock(name: str) -> Any:
    """A method that hands its call to the stock plugin's method ``name``."""

    def forward(self: PrecisionMixin, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    return forward


class PrecisionMixin(PrecisionBase):
    """Precision for streamed models. `Trainer(precision=...)` makes one by itself; build it to set ``master_dtype``.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"``, ``"bf16-true"``, ``"16-true"`` or ``"64-true"``.
        device: Device type of autocast in the mixed precisions; the strategy sets it to the device it runs on.
        master_dtype: With 16-bit parameters, ``"fp32"`` keeps a float32 master that is updated and rounded to the
            parameter each step; ``"param"`` updates the 16-bit values themselves, as plain Lightning does. ``"auto"``
            is ``"fp32"`` in the ``-true`` precisions and ``"param"`` in the others, where the model came with them.
    """

    def __init__(
        self,
        precision: str = "32-true",
        device: str = "cpu",
        master_dtype: Literal["auto", "fp32", "param"] = "auto",
        *,
        inner: Any = None,
    ) -> None:
        self.inner = inner
        self._is_ours = inner is None
        self.is_custom = False  # the plugin is a class of the user's, or of another library
        self.precision = precision if inner is None else inner.precision  # type: ignore[assignment]
        self.device = device
        self.master_dtype = master_dtype

    def prepare(self, stock: Mapping[str, Any], device_type: str | None = None) -> None:
        """Make the stock plugin that does the arithmetic, from the namespace's classes.

        Args:
            stock: Lightning's own classes by name.
            device_type: Where compute runs; None if not known yet.

        Raises:
            ConfigurationError: If the precision is not one we can honour.
        """
        if self._is_ours and device_type is not None and device_type != self.device:
            self.device, self.inner = device_type, None
        self.is_custom = self.inner is not None and type(self.inner) not in stock.values()
        if self.master_dtype not in ("auto", "fp32", "param"):
            raise ConfigurationError(
                f"master_dtype={self.master_dtype!r} is unknown; it may be 'auto', 'fp32' or 'param'"
            )
        if self.precision not in _SUPPORTED and not self.is_custom:
            raise ConfigurationError(
                f"precision={self.precision!r} is not supported by strategy='ssd_offload'; use one of "
                f"{', '.join(_SUPPORTED)}"
            )
        if self.inner is None:
            self.inner = self._make_inner(stock)

    def _make_inner(self, stock: Mapping[str, Any]) -> Any:
        if self.precision.endswith("-mixed"):
            return stock["MixedPrecision"](self.precision, self.device)
        if self.precision == "64-true":
            return stock["DoublePrecision"]()
        return stock["HalfPrecision"](self.precision) if self.precision in _TRUE_DTYPES else stock["Precision"]()

    @property
    def param_dtype(self) -> torch.dtype | None:
        """Dtype that floating parameters get in the store; None leaves them as they are."""
        return None if self.is_custom else _TRUE_DTYPES.get(self.precision)

    @property
    def keeps_master(self) -> bool:
        """Whether 16-bit parameters have a float32 master."""
        return self.master_dtype == "fp32" or (self.master_dtype == "auto" and self.param_dtype is not None)

    @property
    def scaler(self) -> Any:
        """The loss scaler, None if there is none."""
        return getattr(self.inner, "scaler", None)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert buffers now; a parameter is converted when it is written to the store, so no second model is made.

        A plugin of another class converts all by itself.
        """
        if self.is_custom:
            return self.inner.convert_module(module)  # type: ignore[no-any-return]
        dtype = self.param_dtype
        if dtype is not None:
            for m in module.modules():
                for name, buffer in m._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        m._buffers[name] = buffer.to(dtype)
        return module

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        with getattr(model.trainer.strategy, "streaming_backward", nullcontext)():
            self.inner.backward(tensor, model, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if self.scaler is not None:
            unscale_on_host(self.scaler, optimizer)
        return self.inner.optimizer_step(optimizer, *args, **kwargs)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        with torch._C.DisableTorchFunctionSubclass():  # gradients are on the host: none of it needs the device
            self.inner.clip_gradients(*args, **kwargs)

    def teardown(self) -> None:  # noqa: D102
        if self.inner is not None:
            self.inner.teardown()


for _name in (
    "connect", "tensor_init_context", "module_init_context", "forward_context", "train_step_context",
    "val_step_context", "test_step_context", "predict_step_context", "convert_input", "convert_output", "pre_backward",
    "post_backward", "main_params", "state_dict", "load_state_dict",
    "on_save_checkpoint", "on_load_checkpoint",
):  # fmt: skip
    setattr(PrecisionMixin, _name, _stock(_name))


def unscale_on_host(scaler: Any, optimizer: Any) -> None:
    """Make a GPU's loss scaler work on gradients in host memory, for an optimizer whose step is replaced by ours."""
    # A fused optimizer unscales in its own kernel, which does not run here.
    optimizer._step_supports_amp_scaling = False
    if "_unscale_grads_" in vars(scaler):
        return
    unscale = scaler._unscale_grads_

    def unscale_here(optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        # torch copies both numbers to the host asynchronously and reads them before the copy is done: copy them here.
        with torch._C.DisableTorchFunctionSubclass():
            return unscale(optimizer, inv_scale.cpu(), found_inf.cpu(), allow_fp16)  # sync: two numbers

    scaler._unscale_grads_ = unscale_here
