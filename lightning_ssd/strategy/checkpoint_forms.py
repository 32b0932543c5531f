"""Saves a session as one file, as links, or by Lightning's checkpoint plugin.

All begin with links in the store, which cost nothing. What is made of them is compared with its checksums.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_ssd.checkpoint.dictionary import MASTERS, open_dictionary, without_empty_loader_states
from lightning_ssd.checkpoint.directory import remove, sibling
from lightning_ssd.convert.export import Spill, without_decoded
from lightning_ssd.convert.save_file import save_file
from lightning_ssd.io.deadline import within
from lightning_ssd.session.session import Session


def save(session: Session, checkpoint: Mapping[str, Any], path: str, *, is_linked: bool) -> None:
    """Save Lightning's dictionary as a checkpoint, in the form that the settings say; see `Session.save_links`."""
    if not session.sizing.saves_files:
        session.save_links(checkpoint, path, is_linked=is_linked, with_file=True)
        return
    with _links(session, checkpoint, is_linked=is_linked) as links:
        save_file(links, path)


def mapped(session: Session, checkpoint: Mapping[str, Any], *, is_linked: bool) -> dict[str, Any]:
    """Lightning's dictionary as plain Lightning would save it, with tensors mapped from the store as it is now."""
    with _links(session, checkpoint, is_linked=is_linked) as links:
        content, _ = open_dictionary(links, weights_only=False)
        with tempfile.TemporaryFile(dir=session.store.disks.all[0].path) as file:
            spill = Spill(file.fileno())
            content |= {k: without_decoded(content[k], spill) for k in ("optimizer_states", MASTERS) if k in content}
    return without_empty_loader_states(content)


@contextmanager
def _links(session: Session, checkpoint: Mapping[str, Any], *, is_linked: bool) -> Iterator[str]:
    links = os.path.join(session.store.disks.all[0].path, sibling("file", "tmp"))
    session.save_links(checkpoint, links, is_linked=is_linked, with_file=False)
    try:
        with within(session.engine.patience):
            yield links
    finally:
        remove(links)
