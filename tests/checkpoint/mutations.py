"""Changes of a valid checkpoint's files: of values, keys and bytes, mostly with checksums that agree."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning_ssd.checkpoint.checksum import PIECE_NBYTES, checksum
from lightning_ssd.checkpoint.manifest_json import seal

MANIFEST, UNIT, REST, STATE = "manifest.json", "units/00000-a.master.safetensors", "buffers.safetensors", "state.pt"
FOLDER, INDEX = "folder", "folder/model.safetensors.index.json"
SECRET = "secret.safetensors"


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
