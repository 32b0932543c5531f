"""What is refused before a run starts. Each message names the setting and what to do."""

from __future__ import annotations

import signal
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


def require_one_process(environment: Any, num_devices: int, num_nodes: int) -> None:
    """Refuse more than one process: units are not sharded over ranks yet."""
    try:
        world_size = 1 if environment is None else environment.world_size()
    except KeyError:  # an environment of a scheduler, given by hand outside of its jobs
        world_size = 1
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


def require_no_script(module: nn.Module) -> None:
    """Refuse TorchScript modules: their forward does not run our hooks."""
    scripted = next((name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ConfigurationError(
            f"module {scripted!r} is compiled by TorchScript, whose forward would not run the hooks by which "
            "strategy='ssd_offload' moves parameters: use the module that it was made from"
        )


def keep_bus_errors_handled(trainer: Any) -> None:
    """Keep the Trainer from restoring the former handler of SIGBUS.

    Parameters are mapped files after the run too; see [Note: bus errors] in `lightning_ssd.memory.mapped_file`.
    """
    handlers = getattr(getattr(trainer, "_signal_connector", None), "_original_handlers", None)
    if isinstance(handlers, dict) and handlers.get(signal.SIGBUS) is signal.SIG_DFL:
        del handlers[signal.SIGBUS]
