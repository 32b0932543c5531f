"""A manifest as the text of ``manifest.json``, and its strict reading. Opens nothing; sizes in bytes.

The text may come from anywhere: every count is checked before it is used, every path is relative and stays inside the
directory, no name appears twice. The text holds its own checksum, so that a flipped bit in a learning rate is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_ssd.checkpoint.checksum import checksum, num_pieces
from lightning_ssd.checkpoint.manifest import (
    BUFFERS,
    EXTRA_TENSORS,
    FORMAT,
    NAMES_1,
    OWN_FILES,
    STATE,
    VERSION,
    FileRecord,
    Manifest,
    OptimizerRecord,
    SmallFile,
)
from lightning_ssd.codec import float32
from lightning_ssd.errors import CheckpointError, listed
from lightning_ssd.io.safe_open import check_relative_path
from lightning_ssd.store.safetensors_header import (
    ITEMSIZE,
    PREFIX_NBYTES,
    TensorEntry,
    check_contiguous,
    check_entry,
    is_count,
    parse_json_object,
)

ENCODED = "encoded"
"""What `Manifest.codec` says where some kinds of files have to be decoded; see `codec.encodings`."""

CODECS = (float32.NAME, ENCODED)
"""Forms of the state on disk that can be read."""

_NO_CHECKSUM = b'"crc32c":"00000000"'
_T = TypeVar("_T")


def encode_manifest(manifest: Manifest) -> bytes:
    """The text of ``manifest.json``, with the checksum of itself."""
    content = {
        "format": FORMAT,
        "version": manifest.version,
        "crc32c": "00000000",
        **({"id": manifest.id} if manifest.id else {}),
        "step": manifest.step,
        "created_at": manifest.created_at,
        "versions": dict(manifest.versions),
        "codec": manifest.codec,
        "world_size": manifest.world_size,
        "small_files": {
            name: {"nbytes": small.nbytes, "crc32c": f"{small.checksum:08x}"}
            for name, small in manifest.small_files.items()
        },
        "optimizers": [vars(record) for record in manifest.optimizers],
        "dtypes": dict(manifest.dtypes),
        "aliases": dict(manifest.aliases),
        "files": [_encode_file(record) for record in manifest.files],
    } | ({} if manifest.names is None else {"state_dict": list(manifest.names)})
    try:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a name in the checkpoint is not valid Unicode: {error}") from error
    return seal(text)


def seal(text: bytes) -> bytes:
    """Put the checksum of a manifest's text, taken with zeros in its place, into the text."""
    begin = text.index(_NO_CHECKSUM) + _NO_CHECKSUM.index(b"0000")
    return text[:begin] + f"{checksum(text):08x}".encode() + text[begin + 8 :]


def decode_manifest(text: bytes, where: str) -> Manifest:
    """Check and read ``manifest.json``.

    Args:
        text: The file's bytes.
        where: Its path, for messages.

    Raises:
        CheckpointError: If anything about it is not as `encode_manifest` writes it.
    """
    content = parse_json_object(text, where)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not a checkpoint of lightning_ssd (format {str(content.get('format'))!r:.80})")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{where}: version {str(version)!r:.80} of the format, this lightning_ssd reads versions 1 to {VERSION}; "
            "update it, or export the checkpoint to a .ckpt with the lightning_ssd that wrote it"
        )
    _check_seal(text, _take(content, "crc32c", str, where), where)
    files = tuple(_decode_file(value, where) for value in _take(content, "files", list, where))
    _check_unique(files, where)
    manifest = Manifest(
        step=_count(content, "step", where),
        created_at=_take(content, "created_at", str, where),
        versions=_texts(content, "versions", where),
        codec=_decode_codec(content, where),
        world_size=_count(content, "world_size", where),
        files=files,
        dtypes=_texts(content, "dtypes", where),
        aliases=_texts(content, "aliases", where),
        optimizers=tuple(_decode_optimizer(value, where) for value in _take(content, "optimizers", list, where)),
        small_files=_decode_small_files(_take(content, "small_files", dict, where), version, where),
        names=_decode_names(content, where),
        version=version,
        id=_decode_id(content, where),
    )
    _check_names(manifest, where)
    return manifest


def _encode_file(record: FileRecord) -> dict[str, Any]:
    sums = record.checksums
    return {
        "path": record.path,
        "nbytes": record.nbytes,
        "unit": record.unit,
        "kind": record.kind,
        "data_begin": record.data_begin,
        "crc32c_per_mib": None if sums is None else b"".join(s.to_bytes(4, "big") for s in sums).hex(),
        "parameters": {e.name: _encode_entry(e) for e in record.entries},
    } | ({"renamed": dict(record.renamed)} if record.renamed else {})


def _encode_entry(entry: TensorEntry) -> dict[str, Any]:
    content: dict[str, Any] = {"dtype": entry.dtype, "shape": list(entry.shape), "range": [entry.begin, entry.end]}
    return content if entry.stride is None else content | {"stride": list(entry.stride)}


def _decode_file(value: object, where: str) -> FileRecord:
    content = _expect(value, dict, "an entry of files", where)
    path = _take(content, "path", str, where)
    check_relative_path(path, where)
    inside = f"{where}: {path}"
    entries = tuple(
        _decode_entry(name, entry, inside) for name, entry in _take(content, "parameters", dict, inside).items()
    )
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    data_nbytes = check_contiguous(ordered, inside)
    nbytes, data_begin = _count(content, "nbytes", inside), _count(content, "data_begin", inside)
    if data_begin < PREFIX_NBYTES or data_begin + data_nbytes != nbytes:
        raise CheckpointError(
            f"{inside}: data of {data_nbytes} bytes from offset {data_begin} do not make {nbytes} bytes"
        )
    return FileRecord(
        path=path,
        nbytes=nbytes,
        unit=_take(content, "unit", str, inside),
        kind=_take(content, "kind", str, inside),
        data_begin=data_begin,
        entries=entries,
        checksums=_decode_checksums(content.get("crc32c_per_mib"), data_nbytes, inside),
        renamed=_decode_renamed(content, {entry.name for entry in entries}, inside),
    )


def _decode_entry(name: str, value: object, where: str) -> TensorEntry:
    content = _expect(value, dict, f"parameter {name!r}", where)
    shape, span = _take(content, "shape", list, where), _take(content, "range", list, where)
    if len(span) != 2 or not all(map(is_count, (*shape, *span))):
        raise CheckpointError(f"{where}: parameter {name!r}: shape and range must be counts below 2^63")
    stride = tuple(_take(content, "stride", list, where)) if "stride" in content else None
    if not all(map(is_count, stride or ())):
        raise CheckpointError(f"{where}: parameter {name!r}: strides must be counts below 2^63")
    entry = TensorEntry(name, _take(content, "dtype", str, where), tuple(shape), span[0], span[1], stride)
    check_entry(entry, where)
    return entry


def _decode_renamed(content: Mapping[str, Any], names: set[str], where: str) -> dict[str, str]:
    renamed = _texts(content, "renamed", where) if "renamed" in content else {}
    inside = {renamed.get(name, name) for name in names}
    if not set(renamed) <= names or len(inside) < len(names):
        raise CheckpointError(f"{where}: renamed names a parameter that is not there, or two alike")
    return renamed


def _decode_checksums(value: object, data_nbytes: int, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    text = _expect(value, str, "crc32c_per_mib", where)
    if len(text) != 8 * num_pieces(data_nbytes):
        raise CheckpointError(f"{where}: {len(text) / 8:g} checksums for {num_pieces(data_nbytes)} pieces of 1 MiB")
    try:
        raw = bytes.fromhex(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: crc32c_per_mib is not hexadecimal: {error}") from error
    if 2 * len(raw) != len(text):
        raise CheckpointError(f"{where}: crc32c_per_mib holds something else than hexadecimal digits")
    return tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(0, len(raw), 4))


def _decode_small_files(content: dict[str, Any], version: int, where: str) -> dict[str, SmallFile]:
    buffers, extra = (NAMES_1[name] if version == 1 else name for name in (BUFFERS, EXTRA_TENSORS))
    if not {STATE, buffers} <= set(content) <= {STATE, buffers, extra}:
        raise CheckpointError(f"{where}: small_files must be {STATE}, {buffers} and perhaps {extra}")
    found: dict[str, SmallFile] = {}
    for name, value in content.items():
        item = _expect(value, dict, name, where)
        found[name] = SmallFile(_count(item, "nbytes", where), _decode_checksum(item, f"{where}: {name}"))
    return found


def _decode_checksum(content: dict[str, Any], where: str) -> int:
    text = _take(content, "crc32c", str, where)
    if len(text) != 8 or not set(text) <= set("0123456789abcdef"):
        raise CheckpointError(f"{where}: crc32c {text!r:.80} is not eight hexadecimal digits")
    return int(text, 16)


def _decode_optimizer(value: object, where: str) -> OptimizerRecord:
    content = _expect(value, dict, "an entry of optimizers", where)
    inside = f"{where}: optimizers"
    groups = [_expect(group, dict, "a param group", inside) for group in _take(content, "param_groups", list, inside)]
    for group in groups:
        for name in _take(group, "params", list, inside):
            _expect(name, str, "a parameter name", inside)
    state = _take(content, "state", dict, inside)
    for name, scalars in state.items():
        _expect(scalars, dict, f"the state of {name!r}", inside)
    kinds = [_expect(kind, str, "a kind", inside) for kind in _take(content, "kinds", list, inside)]
    lacking = _take(content, "lacking", dict, inside) if "lacking" in content else {}
    for name, without in lacking.items():
        _expect(without, list, f"what {name!r} lacks", inside)
    return OptimizerRecord(_take(content, "class_name", str, inside), groups, state, kinds, lacking)


def _decode_codec(content: Mapping[str, Any], where: str) -> str:
    codec = _take(content, "codec", str, where)
    if codec not in CODECS:
        raise CheckpointError(
            f"{where}: the state is in the form {codec!r:.80}, this lightning_ssd reads {listed(CODECS)}: update "
            "it, or export the checkpoint to a .ckpt with the lightning_ssd that wrote it"
        )
    return codec


def _decode_id(content: Mapping[str, Any], where: str) -> str:
    if "id" not in content:
        return ""
    text = _take(content, "id", str, where)
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise CheckpointError(f"{where}: id {text!r:.80} is not 32 hexadecimal digits")
    return text


def _decode_names(content: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    if "state_dict" not in content:
        return None
    names = _take(content, "state_dict", list, where)
    for name in names:
        _expect(name, str, "a name of state_dict", where)
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where}: state_dict holds a name twice")
    return tuple(names)


def _check_seal(text: bytes, seal_text: str, where: str) -> None:
    field_text = f'"crc32c":"{seal_text}"'.encode(errors="replace")
    actual = f"{checksum(text.replace(field_text, _NO_CHECKSUM, 1)):08x}"
    if actual != seal_text:
        raise CheckpointError(
            f"{where}: the text has checksum {actual}, not {seal_text!r:.80} as it says; it was changed or damaged"
        )


def _check_unique(files: tuple[FileRecord, ...], where: str) -> None:
    paths: set[str] = set()
    names: set[tuple[str, str]] = set()
    for record in files:
        if record.path in paths or record.path in OWN_FILES:
            raise CheckpointError(f"{where}: the file {record.path!r} is listed twice")
        paths.add(record.path)
        for entry in record.entries:
            if (entry.name, record.kind) in names:
                raise CheckpointError(f"{where}: {record.kind} of parameter {entry.name!r} is in two files")
            names.add((entry.name, record.kind))


def _check_names(manifest: Manifest, where: str) -> None:
    for name, dtype in manifest.dtypes.items():
        if dtype not in ITEMSIZE or name not in manifest.parameters:
            raise CheckpointError(f"{where}: dtypes names parameter {name!r} with dtype {dtype!r}; one is unknown")
    for alias, stored in manifest.aliases.items():
        if alias in manifest.parameters or stored in manifest.aliases:
            raise CheckpointError(f"{where}: alias {alias!r} of {stored!r} is a stored name, or leads to an alias")


def _expect(value: object, of: type[_T], what: str, where: str) -> _T:
    if not isinstance(value, of):
        raise CheckpointError(f"{where}: {what} is {type(value).__name__}, not {of.__name__}")
    return value


def _take(content: Mapping[str, Any], key: str, of: type[_T], where: str) -> _T:
    if key not in content:
        raise CheckpointError(f"{where}: {key} is missing")
    return _expect(content[key], of, key, where)


def _count(content: Mapping[str, Any], key: str, where: str) -> int:
    value = _take(content, key, int, where)
    if not is_count(value):
        raise CheckpointError(f"{where}: {key}={value} is not a count below 2^63")
    return value


def _texts(content: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    found = _take(content, key, dict, where)
    if not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{where}: {key} must map text to text")
    return found
