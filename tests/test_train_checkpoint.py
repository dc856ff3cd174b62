"""Checkpoints: what is saved comes back, nothing half-written is ever used, and a file can run no code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmacc.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "config": '{"text": "é"}',
        "model": {"weight": torch.randn(40, 5, generator=generator), "steps": torch.tensor(step)},
        "optimiser": {
            "state": {0: {"exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
        },
    }


def assert_holds(path: Path, step: int) -> None:
    found, wanted = load_checkpoint(path), state(step)
    assert found["step"] == step
    assert found["format"] == 1
    assert {"torch", "python", "cmacc"} <= set(found["versions"])
    assert found["config"] == wanted["config"]
    assert found["optimiser"]["param_groups"] == wanted["optimiser"]["param_groups"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in wanted["model"].items())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_the_last_few_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert latest_checkpoint(folder) is None
    for step in (1, 2, 99, 100, 12345):
        path = save_checkpoint(folder, step, state(step))
        assert latest_checkpoint(folder) == path
        assert find_checkpoint(tmp_path / "run") == path
        assert_holds(path, step)
    assert files(folder) == ["latest", "step-00000100.pt", "step-00012345.pt"]
    assert_holds(folder / "step-00000100.pt", 100)
    assert find_checkpoint(folder / "step-00000100.pt") == folder / "step-00000100.pt"
    save_checkpoint(folder, 20000, state(20000), keep=1)
    assert files(folder) == ["latest", "step-00020000.pt"]


def test_the_pointer_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new file is whole and has its name, the pointer names the old one; until the pointer moves, both stay."""
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    rename, seen = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.name, (tmp_path / "latest").read_text(), (tmp_path / "step-00000001.pt").exists()))
        assert_holds(latest_checkpoint(tmp_path), 1)
        if target.name.endswith(".pt"):
            assert_holds(self, 2)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    save_checkpoint(tmp_path, 2, state(2), keep=1)
    assert seen == [("step-00000002.pt", "step-00000001.pt", True), ("latest", "step-00000001.pt", True)]
    assert files(tmp_path) == ["latest", "step-00000002.pt"]


@pytest.mark.parametrize("when", ["full device", "torch.save", "os.fsync"])
def test_no_room_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    save_checkpoint(tmp_path, 1, state(1))

    save = torch.save

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_to_a_full_device(data: object, _: object) -> None:
        with Path("/dev/full").open("wb") as file:
            save(data, file)

    owner, name, act = {
        "torch.save": (torch, "save", full),
        "os.fsync": (os, "fsync", full),
        "full device": (torch, "save", save_to_a_full_device),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, act)
        with pytest.raises(OSError, match="No space left") as raised:
            save_checkpoint(tmp_path, 2, state(2))
        assert raised.value.errno == errno.ENOSPC
    assert files(tmp_path) == ["latest", "step-00000001.pt"], "what was half written takes up the room that there is"
    assert_holds(latest_checkpoint(tmp_path), 1)
    assert_holds(save_checkpoint(tmp_path, 3, state(3)), 3)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.pt.part").write_bytes(b"half")
    save_checkpoint(tmp_path, 8, state(8))
    assert files(tmp_path) == ["latest", "step-00000008.pt"]


def pickled(obj: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def refuse(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    text = str(raised.value)
    assert text.startswith(str(path))
    assert "; " in text
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore")
def test_damage_is_one_sentence(tmp_path: Path) -> None:
    """Cut anywhere, noise, and a pickle with a byte changed: never another error than CheckpointError."""
    whole = save_checkpoint(tmp_path, 1, {"model": {"weight": torch.zeros(30)}}).read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / "bad.pt"
    for cut in range(0, len(whole), 41):
        refuse(path, whole[:cut])
    for _ in range(300):
        refuse(path, rng.bytes(rng.integers(1, 80)))
        refuse(path, b"\x80\x02" + rng.bytes(rng.integers(1, 80)))
        plain = bytearray(pickle.dumps({"format": 1, "model": [1, (2, 3), {"a": 4.0}]}, 2))
        plain[rng.integers(len(plain))] = rng.integers(256)
        refuse(path, bytes(plain))


@pytest.mark.parametrize("obj", [{"format": 2}, {"format": None}, {}, [1], "text", 5, torch.zeros(3)])
def test_another_format_is_refused(tmp_path: Path, obj: object) -> None:
    assert "this version reads 1; upgrade cmacc" in refuse(tmp_path / "x.pt", pickled(obj))


class Malice:
    """Unpickled by a careless loader, it makes a file."""

    def __init__(self, path: Path, call: Callable[..., Any] = os.system) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["bare pickle", "torch archive", "inside a state"])
def test_a_malicious_file_runs_nothing(tmp_path: Path, form: str) -> None:
    proof, path = tmp_path / "ran", tmp_path / "x.pt"
    bad = Malice(proof)
    data = {
        "bare pickle": lambda: pickle.dumps(bad, 2),
        "torch archive": lambda: pickled(bad),
        "inside a state": lambda: pickled({"format": 1, "step": 1, "model": {"weight": torch.zeros(2), "x": bad}}),
    }[form]()
    refuse(path, data)
    assert not proof.exists()
    # the file is as dangerous as it is meant to be
    inner = zipfile.ZipFile(path).read("archive/data.pkl") if zipfile.is_zipfile(path) else data
    if form != "inside a state":
        pickle.loads(inner)
        assert proof.exists()


@pytest.mark.parametrize("name", ["../step-00000001.pt", "/etc/passwd", "", ".", "..", "sub/step.pt", "step-00000009.pt", "a\0b"])
def test_a_pointer_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, state(1))
    (folder / "sub").mkdir()
    for there in (tmp_path / "step-00000001.pt", folder / "sub" / "step.pt"):
        there.write_bytes((folder / "step-00000001.pt").read_bytes())
    (folder / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest names .*, which is not there; write the name"):
        latest_checkpoint(folder)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*; give"):
        load_checkpoint(tmp_path / "no.pt")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; give"):
        find_checkpoint(tmp_path)
