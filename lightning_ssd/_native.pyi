"""Native I/O engines and optimizer kernels."""

import enum


class IOTransfer:
    """One asynchronous operation; it completes whether or not anyone waits."""

    def done(self) -> bool: ...

    def wait_for(self, seconds: float) -> bool:
        """Wait at most this long; returns done()."""

    def failure(self) -> tuple[int, int, int] | None:
        """(errno, offset, nbytes) of the first piece that failed, once done."""

    def times(self) -> tuple[float, float | None] | None:
        """(begin_s, end_s or None) of time.perf_counter; None while queued."""

class IOEngine:
    """Moves bytes between descriptors and memory; not usable after a fork."""

    def start(self, is_write: bool, direct_fd: int, tail_fd: int, offset: int, address: int, nbytes: int) -> IOTransfer: ...

    def register_memory(self, address: int, nbytes: int) -> bool:
        """Pin memory once that most requests use; False where refused."""

    def stats(self) -> tuple[int, int, int, int, float, float]:
        """The fields of IOStats, in order."""

    def close(self) -> None:
        """Wait for what is in flight and end the threads."""

def make_posix_engine(block_nbytes: int, num_threads: int) -> IOEngine: ...

def make_uring_engine(block_nbytes: int, depth: int) -> IOEngine:
    """Raises OSError where io_uring is missing, forbidden or too old."""

def handle_bus_errors(raise_: object) -> bool:
    """
    Where a watched mapping cannot be read it becomes NaN, and the main thread soon calls `raise_` with what is known of the mapping and the offset in it.
    """

def watch_mapping(address: int, nbytes: int, about: object) -> int:
    """Returns what forget_mapping takes."""

def forget_mapping(watched: int) -> None: ...

class Dtype(enum.Enum):
    """Element type of an array."""

    float32 = 0

    bfloat16 = 1

    float16 = 2

class SqrtForm(enum.Enum):
    """How Adam takes square roots; see docs/design/numerics.md."""

    ieee = 0

    mkl_sse = 1

    mkl_avx2 = 2

    mkl_avx512 = 3

    external = 4

class MomentForm(enum.Enum):
    """How Adam's moments are kept; see native/codec/codec.hpp."""

    float32 = 0

    bfloat16 = 1

    log8 = 2

def adam(param: int, grad: int, grad_dtype: Dtype, exp_avg: int, exp_avg_sq: int, out: int, out_dtype: Dtype, numel: int, *, grad_scale: float, maximize: bool, decay: float, penalty: float, beta1: float, beta2: float, step_size: float, bias2_sqrt: float, eps: float, sqrt_form: SqrtForm, external_sqrt: int, set_external_threads: int, form: MomentForm = MomentForm.float32, high: int = 0, low: int = 0, exp_avg_scale: int = 0, exp_avg_sq_scale: int = 0, key: int = 0, first: int = 0) -> None: ...

def sgd(param: int, grad: int, grad_dtype: Dtype, momentum: int, out: int, out_dtype: Dtype, numel: int, *, grad_scale: float, maximize: bool, penalty: float, momentum_factor: float, dampening: float, nesterov: bool, first_step: bool, lr: float) -> None: ...

def sum_of_squares(data: int, dtype: Dtype, numel: int) -> float: ...

def convert(dst: int, dst_dtype: Dtype, src: int, src_dtype: Dtype, numel: int) -> None: ...

def crc32c(data: int, nbytes: int, initial: int = 0) -> int: ...

def crc32c_each(data: int, nbytes: int, piece_nbytes: int) -> list[int]: ...

def crc32c_by(name: str, data: int, nbytes: int, initial: int = 0) -> int: ...

def crc32c_names() -> list[str]:
    """
    Implementations of CRC32C on this CPU, slowest first; crc32c takes the last.
    """

def matching_sqrt(function: int) -> SqrtForm: ...

def num_kernel_threads() -> int: ...

def set_num_kernel_threads(num: int) -> None: ...

def kernel_levels() -> list[str]:
    """Kernel levels of this CPU, slowest first."""

def kernel_level() -> str:
    """The active kernel level."""

def set_kernel_level(name: str) -> None: ...
