"""Native I/O engines and optimizer kernels."""



class IoTransfer:
    """One asynchronous operation; it completes whether or not anyone waits."""

    def done(self) -> bool: ...

    def wait_for(self, seconds: float) -> bool:
        """Wait at most this long; returns done()."""

    def failure(self) -> tuple[int, int, int] | None:
        """(errno, offset, nbytes) of the first piece that failed, once done."""

class IoEngine:
    """Moves bytes between descriptors and memory; not usable after a fork."""

    def start(self, is_write: bool, direct_fd: int, tail_fd: int, offset: int, address: int, nbytes: int) -> IoTransfer: ...

    def register_memory(self, address: int, nbytes: int) -> bool:
        """Pin memory once that most requests use; False where refused."""

    def stats(self) -> tuple[int, int, int, int, float, float]:
        """The fields of IOStats, in order."""

    def close(self) -> None:
        """Wait for what is in flight and end the threads."""

def make_posix_engine(block_nbytes: int, num_threads: int) -> IoEngine: ...

def make_uring_engine(block_nbytes: int, depth: int) -> IoEngine:
    """Raises OSError where io_uring is missing, forbidden or too old."""
