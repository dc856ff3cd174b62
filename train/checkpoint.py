"""Small atomic checkpoints: write aside, fsync, rename, pointer last. Loading runs no code from the file."""

from __future__ import annotations

import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

FORMAT = 1
POINTER = "latest"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the sentence says which and what to do."""


def _publish(path: Path, data: bytes | dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)  # it takes up the room that may be missing
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save hides what the write said behind a position of its own
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-NNNNNNNN.pt`, then move the pointer to it, then drop all but the last `keep`.

    Raises OSError when the disk is full; the checkpoint before it stays in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):
        left.unlink()  # a kill left it
    path = folder / f"step-{step:08d}.pt"
    versions = {name: version(name) for name in ("torch", "cmacc", "nvidia-dali-cuda130")} | {"python": platform.python_version()}
    _publish(path, {"format": FORMAT, "step": step, "versions": versions, **state})
    _publish(folder / POINTER, path.name.encode())
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint the pointer names, or None in a fresh run."""
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if Path(name).name != name or not (folder / name).is_file():
        raise CheckpointError(
            f"{pointer} names {name!r}, which is not there; write the name of another file of that folder into it"
        )
    return folder / name


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` was given, and `format`, `step`, `versions`. Raises CheckpointError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; give a file, or the folder of a run") from None
    except OSError:
        raise
    except Exception as error:  # what a damaged file makes the unpickler raise has no end: KeyError, IndexError and more
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged ({reason}); use an earlier one of its folder"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state.get('format') if isinstance(state, dict) else None!r}, "
                              f"this version reads {FORMAT}; upgrade cmacc")  # fmt: skip
    return state


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file as given, or the latest of a run's folder. Raises CheckpointError."""
    if path.is_file():
        return path
    found = latest_checkpoint(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoint; give a checkpoint file, or the folder of a run that saved one")
    return found
