"""What `make versions` says of versions that this machine cannot get."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import versions


@pytest.mark.soak
def test_what_cannot_be_installed_is_said_and_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as on a machine without a network
    monkeypatch.setattr(versions, "build_sdist", lambda folder: folder / "none.tar.gz")
    assert versions.main(["lightning==0.0.7", "--folder", str(tmp_path)]) == 2
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split()[:4] == ["-", "-", "-", "lightning==0.0.7:"]
    assert "NOT RUN, could not be installed: ERROR: Could not find a version" in row
    assert not (tmp_path / "lightning-0.0.7").exists()
