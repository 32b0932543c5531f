"""Thousands of damaged and hostile checkpoints through everything that reads one; run as a program, in a small process.

``python -m tests.checkpoint.hostile DIRECTORY SEED COUNT`` makes a checkpoint in DIRECTORY, changes it COUNT times and
reads it each time. It fails, naming the mutation's number, if a reader raises anything but our own errors, opens a file
outside the checkpoint, or needs memory that the files do not account for. Prints counts as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.load import CheckpointReader
from lightning_ssd.checkpoint.manifest import seal
from lightning_ssd.checkpoint.weights import open_weights
from lightning_ssd.errors import CheckpointError, CorruptionError
from lightning_ssd.sizes import MiB
from tests.checkpoint.support import Training

MANIFEST, UNIT, REST, STATE = "manifest.json", "units/00000-a.master.safetensors", "rest.safetensors", "state.pt"
FOLDER, INDEX = "folder", "folder/model.safetensors.index.json"
SECRET = "secret.safetensors"
KiB = 1024


# ---------------------------------------------------------------------------------------------------------- readers


def read_all(path: Path) -> None:
    """Do everything a reader can do."""
    with CheckpointReader(path) as reader:
        for name in reader.parameter_names:
            for kind in reader.kinds(name):
                reader.tensor(name, kind).sum()
        for name in (*reader.parameter_names, *reader.manifest.aliases):
            reader.value(name)
        reader.rest()
        reader.state()
        reader.optimizers()
        reader.verify()


def read_state_and_rest(path: Path) -> None:
    """The small files first: `read_all` would stop at an earlier fault."""
    with CheckpointReader(path) as reader:
        try:
            reader.state()
        finally:
            reader.rest()


def read_weights(path: Path) -> None:
    """As a source of initial weights."""
    source = open_weights(path)
    try:
        for name in source.shapes:
            source.tensor(name).sum()
            source.drop(name)
    finally:
        source.close()


def read_folder(path: Path) -> None:
    """A Hugging Face folder, whose index names files."""
    read_weights(path / FOLDER)


def read_unit_file(path: Path) -> None:
    """A safetensors file alone, without the manifest that would contradict it."""
    read_weights(path / UNIT)


def resume(path: Path) -> None:
    """As `Trainer.fit(ckpt_path=...)` does."""
    from lightning_ssd.strategy.saving import load

    load(path, None)


def command_line(path: Path) -> None:
    """``inspect`` and ``verify``: an exit code, never a traceback."""
    from lightning_ssd.cli.main import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(out):
        codes = [main(["inspect", str(path), "--parameters"]), main(["verify", str(path)])]
    if any(codes):
        raise CheckpointError("exit code 1")


# -------------------------------------------------------------------------------------------------------- mutations


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is, in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


HOSTILE_VALUES: tuple[Any, ...] = (
    f"../{SECRET}", "/etc/passwd", "units/link.safetensors", "units/../manifest.json", "manifest.json", "state.pt",
    "..", f"../../{SECRET}", "F64", "BOOL", "C64", "I4", "a.weight", "b.bias", "0" * 8, "g" * 8, "", "\0", "\ud800",
    "\u202e", "x" * 5000, "1" * 5000,
    -1, 0, 1, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    1.5, -0.0, 1e300, True, False, None, [], {}, [[]] * 3, {"a": {}}, [2**32, 2**32], [0, 2**63 - 1], [1] * 70,
    [1] * 5000,
    {"tensor": ["U8", 999]}, {"tensor": ["C64", 1]}, {"tensor": ["F64", {"float": "nan"}]}, {"pickled": "x"},
    {"tuple": {}}, {"tuple": [{"dict": {"x": 1}}]}, {"float": "1e999"}, {"dict": {"__class__": 1}},
    json.loads("[" * 200 + "]" * 200), json.loads('{"tuple":[' * 60 + "]}" * 60),
)  # fmt: skip


def mutate_values(rng: random.Random, content: Any) -> Any:
    """One to three changes of values, keys and order in a JSON document."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *front, last = rng.choice([path for path in places(content) if path] or [("new",)])
        holder = content
        for key in front:
            holder = holder[key]
        _mutate_one(rng, content, holder, last)
    return content


def _mutate_one(rng: random.Random, content: Any, holder: Any, last: Any) -> None:
    value = holder.get(last) if isinstance(holder, dict) else holder[last]
    action = rng.randrange(8)
    if action == 0:
        holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(["a.weight", "", "../x", "\ud800", "__metadata__", "x" * 3000])] = holder.pop(last, None)
    elif action == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), deepcopy(value))
    elif action == 3 and type(value) is int:
        holder[last] = rng.choice([value + 1, value - 1, -value, value * 2, value + 8, value + 2**32, value << 40])
    elif action == 4:
        # A value from elsewhere in the document: right in form, wrong in place.
        other = content
        for key in rng.choice(list(places(content))):
            other = other[key]
        holder[last] = json.loads(json.dumps(other))
    elif action == 5 and isinstance(value, str) and value:
        at = rng.randrange(len(value))
        holder[last] = value[:at] + rng.choice(["", "/", "..", "\0", "\\", "é", '"', "a"]) + value[at + 1 :]
    else:
        holder[last] = deepcopy(rng.choice(HOSTILE_VALUES))


def repeat_a_key(rng: random.Random, text: bytes) -> bytes:
    """The same name twice in one object."""
    starts = [i for i in range(len(text) - 1) if text[i : i + 1] in b"{," and text[i + 1 : i + 2] == b'"']
    keys = [i + 1 for i in starts if text[text.find(b'"', i + 2) + 1 :][:1] == b":"]
    at = rng.choice(keys)
    key = text[at : text.find(b'"', at + 1) + 1]
    return text[:at] + key + b":" + rng.choice([b"0", b"null", b"[]", b'"x"']) + b"," + text[at:]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(8)
        if action == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[at:]
        elif action == 2:
            del out[at : at + rng.randrange(1, 64)]
        elif action == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif action == 4:
            out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.randrange(1, 200)]
        elif action == 5:
            out[at : at + 8] = rng.choice([2**64 - 1, 2**63, 10**8 + 1, 10**8, 0, 1, 2**31]).to_bytes(8, "little")
        elif action == 6:
            out[at:at] = rng.choice([b"[", b'{"a":', b"(", b"9"]) * rng.choice([10, 1000, 20_000])
        elif out:
            out[at % len(out)] = rng.choice(b'{}[]",:0-9.eE\\\0\xff')
    return bytes(out)


class Original:
    """The valid checkpoint's files, and how to write changed ones."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = {
            str(p.relative_to(directory)): p.read_bytes()
            for p in sorted(directory.rglob("*"))
            if p.is_file() and not p.is_symlink()
        }
        self.nbytes = sum(map(len, self.files.values()))
        self._written: set[str] = set()

    def manifest(self) -> Any:
        return json.loads(self.files[MANIFEST])

    def header(self, name: str) -> tuple[Any, bytes]:
        data = self.files[name]
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    def write(self, name: str, data: bytes) -> None:
        os.unlink(self.directory / name)  # not written in place: unit files are links
        (self.directory / name).write_bytes(data)
        self._written.add(name)

    def write_manifest(self, content: Any, change: Callable[[bytes], bytes] = lambda text: text) -> None:
        """With a right checksum wherever there is place for one, so that the checks behind it are reached."""
        if isinstance(content, dict) and "crc32c" in content:
            content["crc32c"] = "00000000"
        # Escaped or not, a name means the same; what cannot be encoded must be escaped.
        text = change(json.dumps(content, separators=(",", ":")).encode())
        with suppress(ValueError):  # it lost its checksum: that is to be found out too
            text = seal(text)
        self.write(MANIFEST, text)

    def restore(self) -> None:
        for name in self._written:
            (self.directory / name).write_bytes(self.files[name])
        self._written.clear()


def encode_header(rng: random.Random, content: Any, change: Callable[[bytes], bytes] = lambda text: text) -> bytes:
    text = change(json.dumps(content, separators=(",", ":")).encode())
    text += b" " * rng.choice([0, 0, -(len(text) + 8) % 8, -(len(text) + 8) % 4096])
    announced = len(text) + rng.choice([0] * 12 + [1, -1, 8, 2**20, 2**40, 2**63])
    return (announced % 2**64).to_bytes(8, "little") + text


def manifest_values(rng: random.Random, original: Original) -> None:
    original.write_manifest(mutate_values(rng, original.manifest()))


def manifest_keys_twice(rng: random.Random, original: Original) -> None:
    original.write_manifest(original.manifest(), lambda text: repeat_a_key(rng, text))


def manifest_bytes(rng: random.Random, original: Original) -> None:
    if rng.random() < 0.5:
        original.write(MANIFEST, mutate_bytes(rng, original.files[MANIFEST]))
    else:
        original.write_manifest(original.manifest(), lambda text: mutate_bytes(rng, text))


def header_values(rng: random.Random, original: Original) -> None:
    name = rng.choice([UNIT, REST])
    content, data = original.header(name)
    _write_agreeing(rng, original, name, encode_header(rng, mutate_values(rng, content)) + data)


def header_keys_twice(rng: random.Random, original: Original) -> None:
    name = rng.choice([UNIT, REST])
    content, data = original.header(name)
    _write_agreeing(rng, original, name, encode_header(rng, content, lambda text: repeat_a_key(rng, text)) + data)


def header_bytes(rng: random.Random, original: Original) -> None:
    name = rng.choice([UNIT, REST])
    whole = original.files[name]
    end = len(json.dumps(original.header(name)[0], separators=(",", ":"))) + 8
    _write_agreeing(rng, original, name, mutate_bytes(rng, whole[:end]) + whole[end:])


def index_values(rng: random.Random, original: Original) -> None:
    text = json.dumps(mutate_values(rng, json.loads(original.files[INDEX]))).encode()
    original.write(INDEX, mutate_bytes(rng, text) if rng.random() < 0.3 else text)


def file_bytes(rng: random.Random, original: Original) -> None:
    name = rng.choice(sorted(original.files))
    original.write(name, mutate_bytes(rng, original.files[name]))


def state_bytes(rng: random.Random, original: Original) -> None:
    _write_agreeing(rng, original, STATE, mutate_bytes(rng, original.files[STATE]))


def _write_agreeing(rng: random.Random, original: Original, name: str, data: bytes) -> None:
    """Write a file, mostly with a manifest that agrees with its size, checksum and header."""
    original.write(name, data)
    if rng.random() < 0.2:
        return
    content = original.manifest()
    if name in content["small_files"]:
        content["small_files"][name] = {"nbytes": len(data), "crc32c": f"{checksum(data):08x}"}
    else:
        end = 8 + int.from_bytes(data[:8], "little")
        (record,) = [record for record in content["files"] if record["path"] == name]
        record["nbytes"], record["data_begin"] = len(data), min(end, len(data))
        pieces = [data[i : i + PIECE_NBYTES] for i in range(record["data_begin"], len(data), PIECE_NBYTES)]
        record["crc32c_per_mib"] = "".join(f"{checksum(piece):08x}" for piece in pieces)
        try:
            entries = json.loads(data[8:end])
            record["parameters"] = {
                key: {"dtype": value["dtype"], "shape": value["shape"], "range": value["data_offsets"]}
                for key, value in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # no header that a manifest could repeat
    original.write_manifest(content)


Mutation = Callable[[random.Random, Original], None]

MUTATIONS: dict[Mutation, tuple[Callable[[Path], None], ...]] = {
    manifest_values: (read_all, read_weights, resume, command_line),
    manifest_keys_twice: (read_all,),
    manifest_bytes: (read_all, command_line),
    header_values: (read_all, read_state_and_rest, read_unit_file, resume),
    header_keys_twice: (read_all, read_state_and_rest, read_unit_file),
    header_bytes: (read_all, read_state_and_rest, read_unit_file),
    file_bytes: (read_all, resume, command_line),
    state_bytes: (read_state_and_rest, resume),
    index_values: (read_folder,),
}
WEIGHTS = (6, 1, 4, 6, 1, 4, 2, 2, 1)
assert len(WEIGHTS) == len(MUTATIONS)


# --------------------------------------------------------------------------------------------------------- the limits


class Opened:
    """Fails a reader that opens a file outside the checkpoint. An audit hook stays for the life of the process."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._watching = False
        self.outside: list[str] = []
        sys.addaudithook(self._on_event)

    @contextmanager
    def only_inside(self) -> Iterator[None]:
        self.outside.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
        if self.outside:
            raise AssertionError(f"opened outside the checkpoint: {self.outside}")

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        # Opening by a part of a path relative to a directory's descriptor is what `open_inside` does: where it leads
        # was checked there, and the canary's time of last access tells if it was wrong.
        if not self._watching or event != "open" or not isinstance(args[0], str | bytes):
            return
        self._watching = False
        path = os.fsdecode(args[0])
        real = os.path.realpath(path)
        # Sources of the interpreter's own modules are opened for the lines of a traceback or a warning.
        inside = real.startswith((self._root + "/", sys.prefix, sys.base_prefix)) or real == self._root
        if os.path.isabs(path) and not inside:
            self.outside.append(path)
        self._watching = True


def limit_memory(headroom_nbytes: int) -> None:
    """From now on the process may map this much more and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGESIZE") + headroom_nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def make_checkpoint(directory: Path) -> Path:
    """A checkpoint with every kind of file, and beside it files that nobody may read."""
    live = directory / "live"
    live.mkdir(parents=True)
    training = Training(
        live, shapes={"a": {"a.weight": (50, 7), "a.none": (0, 3)}, "b": {"b.scale": (), "b.bias": (5,)}}
    )
    training.advance()
    training.save(directory / "c")
    folder = directory / "c" / FOLDER
    folder.mkdir()
    shutil.copyfile(directory / "c" / UNIT, folder / "shard.safetensors")
    weight_map = {name: "shard.safetensors" for name in ("a.weight", "a.none")}
    (directory / "c" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1400}, "weight_map": weight_map}))
    (directory / SECRET).write_bytes((directory / "c" / UNIT).read_bytes())
    (directory / "c" / "units" / "link.safetensors").symlink_to(directory / SECRET)
    return directory / "c"


def watch_access(path: Path) -> bool:
    """Make the next reading of a file show in its time of last access; False where the file system keeps none."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    path.read_bytes()
    is_kept = os.stat(path).st_atime_ns != 0
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    return is_kept


def main(directory: Path, seed: int, count: int) -> None:
    torch.set_num_threads(1)
    checkpoint = make_checkpoint(directory)
    is_watched = watch_access(directory / SECRET)
    original = Original(checkpoint)
    opened = Opened(checkpoint)
    readers = (read_all, read_state_and_rest, read_weights, read_unit_file, read_folder, resume, command_line)
    for _ in range(2):  # lazy imports and caches
        for reader in readers:
            reader(checkpoint)
    tracemalloc.start()
    for reader in readers:
        reader(checkpoint)
    usual_nbytes = tracemalloc.get_traced_memory()[1]
    # Python's own lists and the allocator's arenas; a tensor of a made-up size would be far beyond.
    limit_memory(16 * MiB)
    outcomes: Counter[str] = Counter()
    worst_nbytes = 0
    mutations = list(MUTATIONS)
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        (mutation,) = rng.choices(mutations, WEIGHTS)
        mutation(rng, original)
        sizes = sum(os.lstat(path).st_size for path in checkpoint.rglob("*"))
        reader = rng.choice(MUTATIONS[mutation])
        where = f"mutation {seed}:{index}, {mutation.__name__} read by {reader.__name__}"
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        outcome = _read(reader, checkpoint, opened, where)
        used = tracemalloc.get_traced_memory()[1] - before
        worst_nbytes = max(worst_nbytes, used)
        # A JSON document becomes Python objects of some 20 times its size.
        if used > usual_nbytes + 20 * sizes:
            raise AssertionError(f"{where}: {used} bytes of memory for files of {sizes} bytes")
        outcomes[f"{mutation.__name__}: {outcome}"] += 1
        original.restore()
    if is_watched and os.stat(directory / SECRET).st_atime_ns:
        raise AssertionError("a file outside the checkpoint was read")
    found = {"worst_nbytes": worst_nbytes, "usual_nbytes": usual_nbytes, "is_watched": is_watched}
    print(json.dumps(found | {"outcomes": dict(sorted(outcomes.items()))}))


def _read(reader: Callable[[Path], None], checkpoint: Path, opened: Opened, where: str) -> str:
    try:
        with opened.only_inside():
            reader(checkpoint)
    except (CheckpointError, CorruptionError) as error:
        text = str(error)
        # A refusal of memory by the limit may come dressed as a file that cannot be read.
        if "memory" in text.lower() and "allocate" in text.lower():
            raise AssertionError(f"{where}: asked for memory it was refused: {text[:500]}") from error
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:500]}") from error
    return "accepted"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
