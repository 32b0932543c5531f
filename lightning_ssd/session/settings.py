"""The options of the strategy: their names, types, defaults, documentation and checks.

`Options` is their one home. The constructor of the strategy has the same names, types and defaults (a test compares
them, since editors and type checkers read a signature from the source), its documentation and the table in the README
are made from the docstring here, and the allowed values from the types.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from lightning_ssd.errors import ConfigurationError
from lightning_ssd.io.engine import IOOptions
from lightning_ssd.kernels import api as kernels
from lightning_ssd.memory.requested import device_budget, host_budget, nbytes_of
from lightning_ssd.paths import local_path, memory_file_system, require_no_url, too_long
from lightning_ssd.sizes import GiB
from lightning_ssd.store.run_directory import INNER_NBYTES

AUTO_FILE_NBYTES = GiB
"""Bytes of parameters and optimizer state from which ``checkpoint="auto"`` saves links."""

PATH_VARIABLE = "LIGHTNING_SSD_PATH"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user sets, as it is written. What does not depend on the machine is checked when one is made.

    Args:
        nvme_path: Directory, or one per disk, for the live store, as text or `pathlib.Path`; ``~`` and ``$VAR`` are
            expanded. Default: ``$LIGHTNING_SSD_PATH``, else ``.ssd_offload`` under ``default_root_dir``.
        host_memory: Budget of host memory in bytes, or text such as ``"16GiB"``. ``"auto"``: half of what the machine
            and the control group leave; ``"min"``: the smallest plan that streams, with nothing held in memory.
        device_memory: Budget of GPU memory for parameters and inputs of recomputed blocks, in bytes or text: those in
            use, and those held for their next use. Other activations and gradients come on top. ``"auto"``: what lets
            one unit arrive while others compute; from the second step on, all that the first has left but a reserve.
        units: ``"auto"``, or class names of the modules that become one unit each.
        min_unit_numel: A module outside repeated blocks with at least this many parameters is a unit of its own;
            smaller ones share one unit, which stays in memory during a step.
        activations: ``"recompute"`` runs each block's forward again in backward; ``"keep"`` keeps what the first
            forward saved; ``"auto"`` recomputes unless everything fits, except blocks that work in place.
        overlap: ``"auto"`` updates units beside compute: during backward where that is exact, else (clipping, a loss
            scaler) during the next forward; ``"off"`` updates them after backward.
        update: ``"native"``: fused kernels for Adam, AdamW and SGD; ``"torch"``: the optimizer's own class, on one
            parameter at a time, bit-equal to plain torch; ``"auto"``: native where there is a kernel.
        state: Form of the optimizer state on disk. ``"fp32"``: float32, one file for each. ``"split"``: the float32
            master of a bfloat16 parameter in two halves, of which the upper one is the parameter itself: 12 bytes per
            parameter with Adam in place of 14, and the same bits in everything. ``"bf16"``: split, with both moments in
            bfloat16, the second one rounded by chance: 8 bytes, not exact. ``"int8"``: the same in 8 bits, as steps of
            the logarithm below the largest of 128: 6.1 bytes. ``"auto"``: split where it is possible (``bf16-true``
            with Adam or AdamW), else fp32.
        master: ``"param"`` updates 16-bit parameters themselves, as plain Lightning does in every precision; ``"fp32"``
            updates a float32 master of each, and rounds it to the parameter. ``"auto"``: a master under ``bf16-true``
            and ``16-true``; none under the others, where the model came with 16-bit parameters.
        window: Units in memory at once, the one in use included; ``"auto"``: as many as the plan has room for.
        prefetch_batch: Units whose reads are started together; ``"auto"`` is one.
        verify_reads: Compare every byte read with a checksum; ``"auto"`` does where the kernel is native.
        io: Disk transport: ``engine``, ``depth``, ``block_nbytes``, ``num_threads``, ``direct``, ``deadline_s``.
        keep_store: Leave the live store on disk when the run ends.
        checkpoint: ``"file"``: one file, as plain Lightning saves it, for whatever opens a ``.ckpt``; it has all bytes,
            so a save takes the time to write them. ``"links"``: a small file and a folder of hard links beside it,
            saved at no cost.
            ``"auto"``: a file while parameters and optimizer state are below 1 GiB.

    Raises:
        ConfigurationError: Names the first option with a value that it cannot have, and what it may be.
    """

    nvme_path: Union[list[Union[str, Path]], str, Path, None] = None  # noqa: UP007  jsonargparse tries in this order
    host_memory: Union[int, str] = "auto"  # noqa: UP007
    device_memory: Union[int, str] = "auto"  # noqa: UP007
    units: Union[list[str], str] = "auto"  # noqa: UP007  a predicate `(name, module) -> bool` works, untyped
    min_unit_numel: int = 1_000_000
    activations: Literal["auto", "recompute", "keep"] = "auto"
    overlap: Literal["auto", "off"] = "auto"
    update: Literal["auto", "native", "torch"] = "auto"
    state: Literal["auto", "fp32", "split", "bf16", "int8"] = "auto"
    master: Literal["auto", "param", "fp32"] = "auto"
    window: Union[int, Literal["auto"]] = "auto"  # noqa: UP007
    prefetch_batch: Union[int, Literal["auto"]] = "auto"  # noqa: UP007
    verify_reads: Union[bool, Literal["auto"]] = "auto"  # noqa: UP007
    io: IOOptions = IOOptions()  # noqa: RUF009  frozen
    keep_store: bool = False
    checkpoint: Literal["auto", "file", "links"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in _choices().items():
            value = getattr(self, name)
            if not any(value == choice and type(value) is type(choice) for choice in choices):  # 1 == True
                self._refuse(name, ", ".join(map(repr, choices)))
        for name in ("window", "prefetch_batch"):
            value = getattr(self, name)
            if value != "auto" and not (type(value) is int and value >= 1):
                self._refuse(name, "'auto' or a number of units from 1")
        if type(self.min_unit_numel) is not int or self.min_unit_numel < 0:
            raise ConfigurationError(f"min_unit_numel={self.min_unit_numel!r} is no number of elements from 0")
        if not isinstance(self.io, IOOptions):
            self._refuse("io", "a lightning_ssd.IOOptions(...)")
        if not callable(self.units) and not isinstance(self.units, str) and not _holds_only(self.units, str):
            self._refuse("units", "'auto' or class names of modules")
        if self.nvme_path is not None and not self._paths():
            self._refuse("nvme_path", "a directory or a list with one per disk")
        nbytes_of("host_memory", self.host_memory, "auto", "min")
        nbytes_of("device_memory", self.device_memory, "auto")

    def _paths(self) -> list[str | Path]:
        """The entries of ``nvme_path``; empty if it is none of what it may be."""
        paths = list(self.nvme_path) if isinstance(self.nvme_path, (list, tuple)) else [self.nvme_path]
        return paths if _holds_only(paths, (str, bytes, os.PathLike)) else []  # type: ignore[return-value]

    def _refuse(self, name: str, allowed: str) -> None:
        raise ConfigurationError(f"{name}={getattr(self, name)!r} is unknown; it may be {allowed}")


def argument_docs() -> str:
    """What the docstring of `Options` says of its fields, indented as there; empty under ``python -OO``."""
    return (Options.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """The options, and what they come to on this machine and device, with this precision.

    Attributes:
        roots: Directories for the live store, one per disk.
        budget_nbytes: Host memory; None for the smallest plan that streams.
        device: Where compute runs.
        device_nbytes: Device memory for parameters; None for what lets one unit arrive while others compute.
        param_dtype: Dtype of floating parameters in the store; None leaves them as they are.
        keep_master: Keep a float32 master of 16-bit parameters.
        is_autocast: Compute runs under autocast.
    """

    roots: list[str]
    budget_nbytes: int | None
    device: torch.device
    device_nbytes: int | None
    param_dtype: torch.dtype | None
    keep_master: bool
    is_autocast: bool

    @classmethod
    def resolve(cls, options: Options, *, default_root: str, device: torch.device, precision: Any) -> Settings:
        """Find out what ``options`` come to, and warn of a store that is in memory.

        Args:
            options: What the user set.
            default_root: The Trainer's ``default_root_dir``.
            device: Where compute runs.
            precision: The `PrecisionMixin`.

        Raises:
            ConfigurationError: If this machine or device cannot honour an option.
        """
        roots = store_roots(options.nvme_path, default_root)
        for root in roots:
            in_memory = memory_file_system(root)
            if in_memory:
                warnings.warn(
                    f"nvme_path={root!r} is on {in_memory}, which is in memory: nothing is saved by streaming "
                    "there, and host_memory does not count it; choose a directory on a disk",
                    stacklevel=2,
                )
        return cls(
            **{field.name: getattr(options, field.name) for field in fields(Options)},
            roots=roots,
            budget_nbytes=host_budget(options.host_memory),
            device=device,
            device_nbytes=device_budget(options.device_memory, device),
            param_dtype=precision.param_dtype,
            keep_master=_keeps_master(options.master, precision),
            is_autocast=precision.precision.endswith("-mixed"),
        )

    @property
    def is_off_host(self) -> bool:
        """Whether compute runs on a device with memory of its own."""
        return self.device.type != "cpu"

    @property
    def is_overlapped(self) -> bool:
        """Updates run beside compute; else after it."""
        return self.overlap == "auto"

    @property
    def window_size(self) -> int | None:
        """Units in memory at once, the one in use included; None for as many as the plan has room for."""
        return None if self.window == "auto" else self.window

    @property
    def prefetch_size(self) -> int:
        """Units whose reads are started together."""
        return 1 if self.prefetch_batch == "auto" else self.prefetch_batch

    @property
    def verify(self) -> bool:
        """Check every read against checksums."""
        return kernels.is_native() if self.verify_reads == "auto" else self.verify_reads


def _keeps_master(master: str, precision: Any) -> bool:
    """Whether 16-bit parameters have a float32 master.

    Raises:
        ConfigurationError: The strategy and the precision plugin were told different things.
    """
    if master == "auto":
        return bool(precision.keeps_master)
    if precision.master_dtype not in ("auto", master):
        raise ConfigurationError(
            f"master={master!r} of the strategy contradicts master_dtype={precision.master_dtype!r} of "
            "SSDOffloadPrecision: set one of them"
        )
    return master == "fp32"


def store_roots(nvme_path: Any, default_root: str) -> list[str]:
    """Directories for the live store: absolute, ``~`` and ``$VAR`` expanded.

    Args:
        nvme_path: The option, one that `Options` has accepted.
        default_root: The Trainer's ``default_root_dir``, used if neither the option nor the variable is set.

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
        chosen = nvme_path if isinstance(nvme_path, (list, tuple)) else [nvme_path]
        paths = [local_path(path, setting) for path in chosen]
    roots = [os.path.abspath(path) for path in paths]
    for root in roots:
        reason = too_long(root, INNER_NBYTES)
        if reason:
            raise ConfigurationError(f"{setting}={root!r} is too long: {reason}; choose a shorter one")
    if len(set(map(os.path.realpath, roots))) < len(roots):
        raise ConfigurationError(f"{setting}={roots} names a directory twice")
    return roots


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The allowed values of each option whose type lists them."""
    hints = get_type_hints(Options)
    return {name: values for name in hints if (values := _values_of(hints[name])) is not None}


def _values_of(annotation: Any) -> tuple[Any, ...] | None:
    if annotation is bool:
        return (True, False)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is Union:
        parts = [_values_of(part) for part in get_args(annotation)]
        return None if None in parts else tuple(value for part in parts for value in part or ())
    return None


def _holds_only(value: object, types: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, types) for item in value)
