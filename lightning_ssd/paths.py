"""Expands paths as users write them (``~``, ``$VAR``), and refuses what is no path of a local disk."""

from __future__ import annotations

import os
import re
from typing import Any

from lightning_ssd.errors import ConfigurationError

NAME_MAX_NBYTES, PATH_MAX_NBYTES = 255, 4095
"""Longest name and longest path that Linux can open."""

_URL = re.compile(r"(?:[A-Za-z][\w.+-]*::)*[A-Za-z][\w.+-]*:/+")
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})", re.ASCII)


def local_path(path: Any, what: str) -> str:
    """``path`` with ``~`` and ``$VAR`` expanded, as Lightning's loggers do it.

    An unknown variable or user is left as it is if a file or folder of that name exists.

    Args:
        path: Text, bytes or a `pathlib.Path`, of any bytes that a file system takes.
        what: Its name in messages, such as ``nvme_path``.

    Raises:
        ConfigurationError: If it is a URL, is empty, holds NUL, or names an unknown variable or user.
    """
    text = home_path(os.path.expandvars(os.fsdecode(path)), what)
    for variable in _VARIABLE.finditer(text):
        end = text.find("/", variable.end())
        if not os.path.lexists(text[: end if end >= 0 else None]):
            raise ConfigurationError(
                f"{what}={os.fsdecode(path)!r} names the environment variable {variable[0]}, which is not set: set it, "
                "or write the directory itself"
            )
    return text


def home_path(path: Any, what: str) -> str:
    """``path`` with ``~`` expanded, as Lightning does it for checkpoints, in which ``$`` is a character.

    Raises:
        ConfigurationError: As `local_path`.
    """
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ConfigurationError(f"{what}={text!r} is no path: it {'holds a NUL byte' if text else 'is empty'}")
    require_no_url(text, what)
    found = os.path.expanduser(text)
    if found.startswith("~") and not os.path.lexists(found.split("/")[0]):
        raise ConfigurationError(f"{what}={text!r} names the home of a user that this machine does not know")
    return found


def is_url(path: Any) -> bool:
    """Whether ``path`` is a URL, also one that has lost a slash in `pathlib.Path` (``s3:/bucket``)."""
    text = os.fsdecode(path)
    url = _URL.match(text)
    return url is not None and (url[0].endswith("//") or not os.path.isdir(url[0]))


def require_no_url(path: str, what: str) -> None:
    """Refuse URLs.

    Raises:
        ConfigurationError: Names it.
    """
    if is_url(path):
        raise ConfigurationError(
            f"{what}={path!r} is a URL; strategy='ssd_offload' works on this machine's disks only: name a local "
            "one, and upload what `lightning-ssd export` makes of a checkpoint"
        )


def too_long(path: str, inner_nbytes: int = 0) -> str:
    """Why ``path``, or a path ``inner_nbytes`` longer, cannot be opened; empty if it can."""
    name = max(os.fsencode(path).split(b"/"), key=len)
    if len(name) > NAME_MAX_NBYTES:
        return f"its part {os.fsdecode(name)!r} has {len(name)} bytes, a name may have {NAME_MAX_NBYTES}"
    nbytes = len(os.fsencode(path))
    if nbytes + inner_nbytes > PATH_MAX_NBYTES:
        inside = f", names inside it up to {inner_nbytes} more" if inner_nbytes else ""
        return f"it has {nbytes} bytes{inside}, a path may have {PATH_MAX_NBYTES}"
    return ""


def memory_file_system(path: str) -> str | None:
    """Type of the file system of ``path`` if it is one in memory, else None."""
    found, kind = b"", b""
    real = os.fsencode(os.path.realpath(path))
    with open("/proc/self/mounts", "rb") as mounts:
        for line in mounts:
            _, escaped, this_kind = line.split(b" ")[:3]
            # Space, tab, newline, backslash and # are written as three octal digits.
            point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), escaped)
            inside = real == point or real.startswith(point.rstrip(b"/") + b"/")
            if inside and len(point) >= len(found):
                found, kind = point, this_kind
    return kind.decode() if kind in (b"tmpfs", b"ramfs") else None
