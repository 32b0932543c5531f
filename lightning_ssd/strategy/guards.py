"""What is refused before a run starts. Each message names the setting and what to do."""

from __future__ import annotations

import signal
import sys
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.step.module_hooks import is_streamed

T = TypeVar("T")


def require_set(value: T | None, what: str) -> T:
    """``value``, which the Trainer sets before it calls anything that needs it.

    Raises:
        ConfigurationError: It is not set yet.
    """
    if value is None:
        raise ConfigurationError(f"strategy='ssd_offload' has no {what} yet: the Trainer has not started")
    return value


def require_one_process(world_size: int, num_devices: int, num_nodes: int) -> None:
    """Refuse more than one process: units are not sharded over ranks yet."""
    if max(world_size, num_devices, num_nodes) > 1:
        raise ConfigurationError(
            f"strategy='ssd_offload' runs one process on one device in this version, the Trainer asks for "
            f"{num_devices} device(s) on {num_nodes} node(s) (world size {world_size}); set devices=1, num_nodes=1"
        )


def require_device(device: torch.device) -> None:
    """Refuse devices other than the CPU and CUDA."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"strategy='ssd_offload' runs on accelerator='cpu' or 'gpu' (CUDA), not on {device.type!r}"
        )


def require_not_streamed(module: nn.Module) -> None:
    """Refuse a module that another Trainer streams now: both would set the memory of its parameters."""
    if is_streamed(module):
        raise ConfigurationError(
            "another Trainer with strategy='ssd_offload' streams this module now (in a fit, of which this may be "
            "a hook): give the inner Trainer strategy='auto', which reads the same weights, or start it afterwards"
        )


def require_no_compile(module: nn.Module) -> None:
    """Refuse compiled modules: their forward does not run our hooks."""
    compiled = getattr(module, "_compiler_ctx", None) is not None
    inner = any(type(m).__name__ == "OptimizedModule" for m in module.modules())
    if compiled or inner:
        raise ConfigurationError(
            "the module is wrapped by torch.compile; strategy='ssd_offload' moves parameters by hooks that a compiled "
            "forward would not run: pass the module without torch.compile"
        )
    scripted = next((name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ConfigurationError(
            f"module {scripted!r} is compiled by TorchScript, whose forward would not run the hooks by which "
            "strategy='ssd_offload' moves parameters: use the module that it was made from"
        )


ASYNC_IS_NOT_NEEDED = (
    "ssd_offload: AsyncCheckpointIO has nothing to do: a save makes hard links instead of copies, and the checkpoint "
    "is complete when it returns"
)


def is_async_checkpoint_plugin(plugin: Any) -> bool:
    """Whether ``plugin`` is an ``AsyncCheckpointIO`` over Lightning's own format, which is accepted and not used.

    Raises:
        ConfigurationError: If it is another checkpoint plugin, which would write files of its own.
    """
    if plugin is None:
        return False
    inner = getattr(plugin, "checkpoint_io", None)
    for namespace in ("lightning.pytorch", "pytorch_lightning"):
        plugins = sys.modules.get(f"{namespace}.plugins")
        if plugins is not None and isinstance(plugin, plugins.AsyncCheckpointIO):
            if inner is None or type(inner) is plugins.TorchCheckpointIO:
                return True
            plugin = inner
    raise ConfigurationError(
        f"the checkpoint plugin {type(plugin).__name__} cannot be used with strategy='ssd_offload', whose checkpoints "
        "are directories of hard links: remove it from plugins"
    )


def keep_bus_errors_handled(trainer: Any) -> None:
    """Keep the Trainer from restoring the former handler of SIGBUS.

    Parameters are mapped files after the run too; see [Note: bus errors] in `lightning_ssd.memory.mapped_file`.
    """
    handlers = getattr(getattr(trainer, "_signal_connector", None), "_original_handlers", None)
    if isinstance(handlers, dict) and handlers.get(signal.SIGBUS) is signal.SIG_DFL:
        del handlers[signal.SIGBUS]
