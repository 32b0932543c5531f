"""Parameters that are being created: each is a mapping of a file of its own, so that no model is ever in memory.

While a `ParamMaterializer` is armed, every parameter that a module registers is moved to such a file, whatever code
creates and fills it: ``configure_model``, `trainer.init_module()`, Hugging Face's ``from_pretrained``. Files are
unlinked at once; their space is free when the values are in the store.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_ssd.creation.own_initialisation import initialises_whole, mark, require_initialised
from lightning_ssd.device.on_host import host_classes, make_plain
from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.scratch import Scratch
from lightning_ssd.memory.mapped_file import map_file
from lightning_ssd.memory.views import Views
from lightning_ssd.sizes import MiB
from lightning_ssd.store.decoded import DecodedTensor, values_of
from lightning_ssd.store.strides import is_dense, stride_of

MIN_NBYTES = MiB // 4
"""Parameters below this stay where they were made: a mapping costs a page and a descriptor."""


class ParamMaterializer:
    """Makes mapped parameters in files of ``scratch``.

    Args:
        scratch: Makes the files.
        device: Where plain Lightning makes parameters: random values are drawn there.
    """

    def __init__(self, scratch: Scratch, device: torch.device) -> None:
        self._scratch = scratch
        self._device = device
        self._on_host = host_classes(device)
        self._numbers = itertools.count()
        self._ours: set[int] = set()  # addresses of the mappings made here

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Inside, parameters are mapped files as soon as they are registered; tensors are made on the device.

        On a GPU they say until the end that they are there: [Note: values on the host].
        """
        made: list[weakref.ref[nn.Parameter]] = []
        hook = partial(self._on_register, made)
        handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
        try:
            with nullcontext() if self._device.type == "cpu" else self._device:
                yield
        finally:
            handle.remove()
            for param in (ref() for ref in made):
                if param is not None:
                    make_plain(param)

    def materialize(self, root: nn.Module) -> None:
        """Replace parameters on the meta device by mapped ones and let their modules initialise them.

        Raises:
            ConfigurationError: If a module cannot initialise its own parameters; names it.
        """
        made: dict[nn.Parameter, nn.Parameter] = {}
        whole: set[nn.Module] = set()  # whose outer module has initialised them
        for name, module in list(root.named_modules()):
            if module in whole:
                continue
            if initialises_whole(module) and any(map(_has_meta, module.modules())):
                whole.update(module.modules())
                self._initialise_whole(name, module, made)
                continue
            if _has_meta(module) and any(p not in made for p in _meta_tensors(module)):
                _require_initialiser(name, module)
                _require_all_meta(name, module, set(made.values()))
            if self._replace(module, made):
                cast(Any, module).reset_parameters()

    def _initialise_whole(self, name: str, module: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> None:
        """As ``module.to_empty(device="cpu")`` and ``module.init_weights()``."""
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        fresh: dict[Tensor, int] = {}
        for inner_name, inner in module.named_modules(prefix=name):
            _require_all_meta(inner_name, inner, set(made.values()))
            for key, param in inner._parameters.items():
                if param is not None and param.is_meta and param not in made:
                    places.setdefault(param, []).append((inner, key))
            # `to_empty` unties parameters too: each is initialised, and then the model ties them again.
            fresh |= {tensor: tensor._version for tensor in self._replace(inner, dict(made))}
        for tensor in fresh:
            mark(tensor)
        cast(Any, module).init_weights()
        for param, (first, *others) in places.items():
            made[param] = cast(nn.Parameter, first[0]._parameters[first[1]])
            for other, key in others:
                other._parameters[key] = made[param]
        require_initialised(name, module, fresh)

    def _replace(self, module: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> list[Tensor]:
        """Give the own parameters and buffers of ``module`` that are on the meta device memory; returns new ones."""
        fresh: list[Tensor] = []
        for key, param in module._parameters.items():
            if param is not None and param.is_meta:
                if param not in made:
                    made[param] = nn.Parameter(self._map(param), requires_grad=param.requires_grad)
                    fresh.append(made[param])
                module._parameters[key] = made[param]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = fresh_buffer = torch.empty_like(buffer, device="cpu")
                fresh.append(fresh_buffer)
        return fresh

    def widen(self, root: nn.Module, dtype: torch.dtype) -> None:
        """Convert floating parameters that have fewer bits; values that are not in memory stay out of it."""
        for param in root.parameters():
            if param.is_floating_point() and param.dtype.itemsize < dtype.itemsize and not param.is_meta:
                is_mapped = param.nbytes >= MIN_NBYTES and param.device.type == "cpu"
                with torch.no_grad(), torch.inference_mode(False):
                    param.data = self._map(param, dtype).copy_(param) if is_mapped else param.to(dtype)

    def load(self, root: nn.Module, weights: Mapping[str, Any], *, strict: bool) -> None:
        """`Module.load_state_dict`; into a model on the meta device, mapped tensors go as they are, without a copy."""
        names: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in root.modules():
            for key, param in module._parameters.items():
                if param is not None and param.is_meta:
                    names.setdefault(param, []).append((module, key))
        weights = self._undecoded(weights)
        # A module's own `load_state_dict` may take what Lightning gives it, and nothing more.
        options = {"assign": True} if names else {}
        root.load_state_dict(weights, strict=strict, **options)
        for places in names.values():  # assigning gave each name a parameter of its own: tie them again
            module, key = places[0]
            for other, other_key in places[1:]:
                other._parameters[other_key] = module._parameters[key]

    def _undecoded(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """``weights`` with what has to be decoded in files of its own, so that it does not fill memory."""
        found: dict[str, Tensor] = {}
        for name, value in weights.items():
            if isinstance(value, DecodedTensor):
                with torch.no_grad(), torch.inference_mode(False):
                    found[name] = self._map(value).copy_(values_of(value))
        if not found:
            return weights
        plain = copy(weights)  # with its versions
        plain.update(found)  # type: ignore[attr-defined]
        return plain

    def _on_register(
        self, made: list[weakref.ref[nn.Parameter]], module: nn.Module, name: str, param: nn.Parameter | None
    ) -> nn.Parameter | None:
        if type(param) is not nn.Parameter or param.is_meta or param.nbytes < MIN_NBYTES:
            return None
        if param.device.type not in ("cpu", self._device.type) or not is_dense(param.shape, param.stride()):
            return None
        if param.data_ptr() in self._ours:
            return None
        # The same object with other memory: whoever made it may have marked it, and looks for the mark (transformers).
        values = self._map(param)
        is_on_device = param.device.type != "cpu"
        with torch.no_grad(), torch.inference_mode(False):
            values.copy_(param)  # sync: only if it was on the device
            param.data = values
        if is_on_device:
            param.__class__ = self._on_host.param
            made.append(weakref.ref(param))
        return None

    def _map(self, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the parameter's form in a file of its own, not initialised."""
        dtype = dtype or param.dtype
        nbytes = max(param.numel() * dtype.itemsize, 1)
        file = self._scratch.make(f"created-{next(self._numbers):08d}.safetensors", nbytes)
        try:
            memory = map_file(file.tail_fd, file.nbytes, file.path, lambda offset: "a parameter that is being created")
        finally:
            file.close()
        tensor = Views(memory).tensor(0, dtype, param.shape, stride_of(param))
        self._ours.add(tensor.data_ptr())
        return tensor


def _meta_tensors(module: nn.Module) -> list[Tensor]:
    """Own parameters and buffers on the meta device."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.is_meta]


def _has_meta(module: nn.Module) -> bool:
    return bool(_meta_tensors(module))


def _require_all_meta(name: str, module: nn.Module, made: set[nn.Parameter]) -> None:
    filled = [k for k, p in module._parameters.items() if p is not None and not p.is_meta and p not in made]
    if filled:
        raise ConfigurationError(
            f"module {name!r} ({type(module).__name__}) has values for {', '.join(filled)} and others still on the "
            "meta device; initialising it would overwrite what is there: load all of its parameters, or none"
        )


def _require_initialiser(name: str, module: nn.Module) -> None:
    if not callable(getattr(module, "reset_parameters", None)):
        raise ConfigurationError(
            f"module {name!r} ({type(module).__name__}) has parameters or buffers on the meta device and no "
            "reset_parameters() to give them values; add one, load weights into it, or build it outside "
            "torch.device('meta') in configure_model (there, parameters are mapped to files as they are made)"
        )
