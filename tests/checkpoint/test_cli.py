from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_ssd.cli.main import COMMANDS, main
from tests.checkpoint.support import Training


@pytest.fixture
def checkpoint(training: Training, tmp_store: Path) -> Path:
    training.save(tmp_store / "c")
    return tmp_store / "c"


def test_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--parameters"]) == 0
    out = capsys.readouterr().out
    for text in ("step        1", "AdamW: 4 parameters in 2 group(s)", "head.weight = a.weight", "420,700", "700x601"):
        assert text in out
    assert "b.bias" in out
    assert "master:BF16 exp_avg:BF16" in out


def test_names_do_not_act_on_the_terminal(
    training: Training, tmp_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\u202eevil\r\nforged"
    training.shapes = {evil: {f"a{evil}": (3,)}}
    training.advance()
    training.save(tmp_store / "c", aliases={f"b{evil}": f"a{evil}"}, dtypes={})
    assert main(["inspect", str(tmp_store / "c"), "--parameters"]) == 0
    assert main(["verify", str(tmp_store / "nowhere" / evil)]) == 1
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "forged" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert not [line for line in captured.out.splitlines() if line.startswith("forged")]


def test_verify_tells_damage_by_its_exit_code(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint)]) == 0
    assert "no damage" in capsys.readouterr().out
    victim = checkpoint / "units" / "00000-a.master.safetensors"
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    assert main(["verify", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'a.weight'" in captured.err


def test_export(checkpoint: Path, tmp_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), str(tmp_store / "out.ckpt")]) == 0
    assert capsys.readouterr().out == f"{tmp_store / 'out.ckpt'}\n"
    assert set(torch.load(tmp_store / "out.ckpt")["state_dict"]) >= {"a.weight", "head.weight", "buffer"}
    assert main(["export", str(checkpoint), str(tmp_store / "out.ckpt")]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(tmp_store / "out.ckpt"), "--overwrite"]) == 0
    assert main(["export", str(checkpoint), str(tmp_store / "hf"), "--strip-prefix", "a.", "--max-shard", "1MB"]) == 0
    assert "left out" in capsys.readouterr().err
    assert (tmp_store / "hf" / "model.safetensors").exists() or (
        tmp_store / "hf" / "model.safetensors.index.json"
    ).exists()


@pytest.mark.parametrize("arguments", [[], ["dance"], ["export", "c"], ["export", "c", "d", "--max-shard", "much"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("command", [command.NAME for command in COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "usage: lightning-ssd" in capsys.readouterr().out


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path)]) == 1
        assert str(tmp_path) in capsys.readouterr().err
