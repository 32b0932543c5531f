"""Host memory is registered with CUDA and unregistered again; a refusal is said and nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_ssd.memory.pinned import Pinned


class Cudart:
    def __init__(self, result: int) -> None:
        self.result = result
        self.calls: list[tuple[str, int]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address))
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return self.result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return torch.device("cpu")


def test_registered_once_and_undone_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    cudart = Cudart(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pinned = Pinned(4096, 8192, device)
        assert pinned.is_registered
        pinned.close()
        pinned.close()
    assert cudart.calls == [("register", 4096), ("unregister", 4096)]


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    cudart = Cudart(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.warns(UserWarning, match=r"could not register 8.00 KiB .*error 2"):
        pinned = Pinned(4096, 8192, device)
    assert not pinned.is_registered
    pinned.close()
    assert cudart.calls == [("register", 4096)]
