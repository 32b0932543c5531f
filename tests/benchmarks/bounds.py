"""The shortest time that a step can take, from its pieces measured alone. Pure arithmetic: bytes, seconds, GB/s."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_UNIT_COUNTS_FROM = 0.03  # of all parameters
FORMULAS = {
    "disk_s": "read_nbytes / r + written_nbytes / w",
    "ungated_bound_s": "max(disk_s, compute_s, update_s) + first_update_s",
    "first_update_s": "update of the unit that forward needs first, whose gradient comes last, alone: "
    "max(share * update_s, its written_nbytes * read_per_written / r + its written_nbytes / w) where it holds over "
    "3 % of the parameters, else 0; its bytes are its share of the units whose states are not kept in memory",
    "strict_bound_s": "max(disk_s, max(compute_s, update_s) + first_update_s): no byte counts twice",
    "beside_bound_s": "forward and backward with everything in memory while the disk, by a thread beside it, moves as "
    "many bytes and nothing waits for anything, + first_update_s: what disk and compute cost each other is in it, the "
    "update's arithmetic is not",
    "gated_bound_s": "max(forward_s, disk_s of the bytes moved in forward) + max(backward_s, disk_s of the others)",
    "efficiency": "bound / step",
}


@dataclass(frozen=True)
class Rates:
    """What the disk does alone, GB/s."""

    read_gbps: float
    write_gbps: float

    def disk_s(self, read_nbytes: float, written_nbytes: float) -> float:
        """Reads and writes share the disk: their times add up."""
        return read_nbytes / self.read_gbps / 1e9 + written_nbytes / self.write_gbps / 1e9


@dataclass(frozen=True)
class Pieces:
    """One step's parts, each measured alone, seconds.

    Attributes:
        forward_s: Forward with everything in memory.
        backward_s: Backward, with the recomputed forward if the step has one.
        compute_s: The whole step with everything in memory, less its update.
        update_s: The update kernel over all parameters.
    """

    forward_s: float
    backward_s: float
    compute_s: float
    update_s: float


@dataclass(frozen=True)
class Moved:
    """Bytes that one step moved."""

    forward_read_nbytes: float
    forward_written_nbytes: float
    other_read_nbytes: float
    other_written_nbytes: float

    @property
    def read_nbytes(self) -> float:
        """All reads."""
        return self.forward_read_nbytes + self.other_read_nbytes

    @property
    def written_nbytes(self) -> float:
        """All writes."""
        return self.forward_written_nbytes + self.other_written_nbytes


@dataclass(frozen=True)
class FirstUnit:
    """The unit that forward needs first, whose gradient comes last.

    Attributes:
        share: Of all parameters.
        written_share: Of the parameters whose states are written to disk; 0 if its own stay in memory.
        read_per_written: Bytes that an update reads for each that it writes.
    """

    share: float
    written_share: float
    read_per_written: float


def first_update_s(moved: Moved, rates: Rates, update_s: float, first: FirstUnit) -> float:
    """The update of the first-needed unit with nothing beside it."""
    if first.share <= FIRST_UNIT_COUNTS_FROM:
        return 0.0
    written = first.written_share * moved.written_nbytes
    return max(first.share * update_s, rates.disk_s(written * first.read_per_written, written))


def ungated_bound_s(moved: Moved, rates: Rates, pieces: Pieces, first_s: float) -> float:
    """Updates run as gradients arrive; only the first-needed unit's cannot hide."""
    disk_s = rates.disk_s(moved.read_nbytes, moved.written_nbytes)
    return max(disk_s, pieces.compute_s, pieces.update_s) + first_s


def strict_bound_s(moved: Moved, rates: Rates, pieces: Pieces, first_s: float) -> float:
    """The same where the disk is the slowest and has the first-needed unit's bytes in its time already."""
    disk_s = rates.disk_s(moved.read_nbytes, moved.written_nbytes)
    return max(disk_s, max(pieces.compute_s, pieces.update_s) + first_s)


def gated_bound_s(moved: Moved, rates: Rates, pieces: Pieces) -> float:
    """Updates wait for the end of backward and run under the next forward."""
    forward_disk_s = rates.disk_s(moved.forward_read_nbytes, moved.forward_written_nbytes)
    other_disk_s = rates.disk_s(moved.other_read_nbytes, moved.other_written_nbytes)
    return max(pieces.forward_s, forward_disk_s) + max(pieces.backward_s, other_disk_s)
