"""What is refused, or warned about, before anything starts; each message names the setting and the way out."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

import torch
from torch import nn

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.memory.limits import AUTO_SHARE, available_nbytes
from lightning_ssd.paths import local_path, require_no_url, too_long
from lightning_ssd.sizes import parse_nbytes
from lightning_ssd.step.module_hooks import is_streamed
from lightning_ssd.store.run_directory import INNER_NBYTES

PATH_VARIABLE = "LIGHTNING_SSD_PATH"


def require_one_process(world_size: int, num_devices: int, num_nodes: int) -> None:
    """Refuse more than one process until units are sharded over ranks."""
    if max(world_size, num_devices, num_nodes) > 1:
        raise ConfigurationError(
            f"strategy='ssd_offload' runs one process on one device in this version, the Trainer asks for "
            f"{num_devices} device(s) on {num_nodes} node(s) (world size {world_size}); set devices=1, num_nodes=1"
        )


def require_device(device: torch.device) -> None:
    """Refuse devices we have no route to."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"strategy='ssd_offload' runs on accelerator='cpu' or 'gpu' (CUDA), not on {device.type!r}"
        )


def require_choices(settings: dict[str, Any]) -> None:
    """Refuse values outside the documented ones."""
    allowed: dict[str, tuple[Any, ...]] = {
        "activations": ("auto", "recompute", "keep"),
        "overlap": ("auto", "off"),
        "update": ("auto", "native", "torch"),
        "state": ("fp32",),
        "verify_reads": ("auto", True, False),
        "keep_store": (True, False),
    }
    for name, values in allowed.items():
        if not any(settings[name] == value and type(settings[name]) is type(value) for value in values):  # 1 == True
            raise ConfigurationError(f"{name}={settings[name]!r} is unknown; it may be {', '.join(map(repr, values))}")
    for name in ("window", "prefetch_batch"):
        value = settings[name]
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ConfigurationError(f"{name}={value!r} is unknown; it may be 'auto' or a number of units from 1")
    if type(settings["min_unit_numel"]) is not int or settings["min_unit_numel"] < 0:
        raise ConfigurationError(f"min_unit_numel={settings['min_unit_numel']!r} is no number of elements from 0")
    if not isinstance(settings["io"], IOOptions):
        raise ConfigurationError(f"io={settings['io']!r} is unknown; it may be a lightning_ssd.IOOptions(...)")
    units = settings["units"]
    if not callable(units) and not isinstance(units, str) and not _is_list_of_text(units):
        raise ConfigurationError(f"units={units!r} is unknown; it may be 'auto' or class names of modules")


def host_budget(host_memory: int | str) -> int | None:
    """Bytes that ``host_memory`` allows; None for ``"min"``.

    Raises:
        ConfigurationError: If it is no size, or more than this process may take.
    """
    if host_memory == "min":
        return None
    available = available_nbytes()
    if host_memory == "auto":
        return int(available * AUTO_SHARE)
    try:
        budget = parse_nbytes(host_memory)
    except ValueError as error:
        raise ConfigurationError(f"host_memory: {error}; or 'auto' or 'min'") from None
    if budget > available:
        raise ConfigurationError(
            f"host_memory={host_memory!r} is {budget} bytes, this process can take {available} (the machine's and "
            "its control group's limits): set a smaller one, or 'auto'"
        )
    return budget


def device_budget(device_memory: int | str, device: torch.device) -> int | None:
    """Bytes that ``device_memory`` allows; None for ``"auto"``.

    Raises:
        ConfigurationError: If it is no size, or the device has no memory of its own.
    """
    if device_memory == "auto":
        return None
    if device.type == "cpu":
        raise ConfigurationError(
            f"device_memory={device_memory!r} bounds the memory of a GPU, this run computes on the CPU, where "
            "host_memory bounds everything: leave device_memory at 'auto'"
        )
    try:
        return parse_nbytes(device_memory)
    except ValueError as error:
        raise ConfigurationError(f"device_memory: {error}; or 'auto'") from None


def store_roots(nvme_path: object, default_root: str) -> list[str]:
    """Directories for the live store: absolute, ``~`` and ``$VAR`` expanded.

    Raises:
        ConfigurationError: If one cannot be a directory of a local disk.
    """
    setting = "nvme_path"
    if nvme_path is None and (variable := os.environ.get(PATH_VARIABLE)):
        setting, nvme_path = f"${PATH_VARIABLE}", variable
    if nvme_path is None:
        require_no_url(default_root, "default_root_dir (where nvme_path is not set)")
        paths = [os.path.join(default_root, ".ssd_offload")]
    else:
        chosen = list(nvme_path) if isinstance(nvme_path, (list, tuple)) else [nvme_path]
        if not chosen or not all(isinstance(path, (str, bytes, os.PathLike)) for path in chosen):
            raise ConfigurationError(
                f"{setting}={nvme_path!r} is unknown; it may be a directory or a list with one per disk"
            )
        paths = [local_path(path, setting) for path in chosen]
    roots = [os.path.abspath(path) for path in paths]
    for root in roots:
        reason = too_long(root, INNER_NBYTES)
        if reason:
            raise ConfigurationError(f"{setting}={root!r} is too long: {reason}; choose a shorter one")
    if len(set(map(os.path.realpath, roots))) < len(roots):
        raise ConfigurationError(f"{setting}={roots} names a directory twice")
    return roots


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def memory_file_system(path: str) -> str | None:
    """Name of the file system of ``path`` if it lives in memory."""
    found, kind = b"", b""
    real = os.fsencode(os.path.realpath(path))
    with open("/proc/self/mounts", "rb") as mounts:
        for line in mounts:
            _, escaped, this_kind = line.split(b" ")[:3]
            # Space, tab, newline, backslash and # come as three octal digits; every other byte as it is.
            point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), escaped)
            inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
            if inside and len(point) >= len(found):
                found, kind = point, this_kind
    return kind.decode() if kind in (b"tmpfs", b"ramfs") else None


def require_not_streamed(module: nn.Module) -> None:
    """Refuse a module that another Trainer streams now: both would give its parameters their memory."""
    if is_streamed(module):
        raise ConfigurationError(
            "another Trainer with strategy='ssd_offload' streams this module now (in a fit, of which this may be "
            "a hook): give the inner Trainer strategy='auto', which reads the same weights, or start it afterwards"
        )


def require_no_compile(module: nn.Module) -> None:
    """Refuse compiled modules: a compiler would trace through hooks that must run."""
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
    "ssd_offload: AsyncCheckpointIO has nothing to do: a save makes hard links and waits for no copy, so checkpoints "
    "are whole when it returns"
)


def is_async_checkpoint_plugin(plugin: Any) -> bool:
    """Whether ``plugin`` is an ``AsyncCheckpointIO`` over Lightning's own format, which needs nothing here.

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
    """Have the Trainer, which puts back every signal's handler that Python knew, leave that of SIGBUS.

    Parameters are mapped files after the run, too; see [Note: bus errors] in `lightning_ssd.memory.mapped_file`.
    """
    handlers = getattr(getattr(trainer, "_signal_connector", None), "_original_handlers", None)
    if isinstance(handlers, dict) and handlers.get(signal.SIGBUS) is signal.SIG_DFL:
        del handlers[signal.SIGBUS]
