"""Bytes: units, alignment, parsing and printing. Pure arithmetic."""

from __future__ import annotations

import re
from fractions import Fraction

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

BLOCK_NBYTES = 4096
"""Alignment of file offsets, memory addresses and lengths under O_DIRECT."""

_UNITS = {
    "": 1,
    "b": 1,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": TiB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def round_up(nbytes: int, multiple: int = BLOCK_NBYTES) -> int:
    """Smallest multiple of ``multiple`` that is not below ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def round_down(nbytes: int, multiple: int = BLOCK_NBYTES) -> int:
    """Largest multiple of ``multiple`` that is not above ``nbytes``."""
    return nbytes // multiple * multiple


def parse_nbytes(text: int | str) -> int:
    """Bytes in ``text``: an int, or a number with a unit such as ``"16GiB"`` or ``"500MB"``.

    Raises:
        ValueError: If the text is not a non-negative size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"a size cannot be negative, got {text}")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"cannot read {text!r} as a size; write bytes as an int, or e.g. '16GiB' or '500MB'")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def fmt(nbytes: int) -> str:
    """``nbytes`` for people: ``'1.50 GiB'``; exact below 1 KiB."""
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"
