"""A checkpoint at rest: tensors in one safetensors file, all else in JSON beside it, and a pointer. No code is read from any.

    step-00000012.safetensors   tensors, by flat dotted names
    step-00000012.json          step, facts, versions, bytes and sha256 of the tensors' file, and a digest of its own content
    latest                      the newest: its name and that digest

They are written in this order, each whole or not at all, in a folder or at any fsspec URL. What is read is checked before it is
used: each file against its digest, and the pointer against the JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cmacc.shards.place import Part, Place, place, public_address

FORMAT = 2
POINTER = "latest"
TENSORS, DESCRIPTION = ".safetensors", ".json"
_FILE = re.compile(rf"step-(\d{{8,}})({re.escape(TENSORS)}|{re.escape(DESCRIPTION)})")
_POINTER = re.compile(rf"step-(\d{{8,}})(?:{re.escape(TENSORS)}|{re.escape(DESCRIPTION)})?(?: ([0-9a-f]{{64}}))?[ \n]*")
_BLOCK = 16 << 20  # bytes given to a file at once
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the sentence says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved. tensors: by flat dotted names; facts: JSON; description: all that the JSON file says; address: of it."""

    address: str
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    description: dict[str, Any]

    @property
    def versions(self) -> Any:
        """Of what wrote it, by name; None where it does not say."""
        return self.description.get("versions")


def checkpoint_folder(run: str | os.PathLike[str], at: str = "") -> str:
    """Where the checkpoints of a run are: the folder or URL `at`, or `checkpoints` in the run's own."""
    return at or f"{os.fspath(run)}/checkpoints"


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


# --- reading ---


def latest(where: str | os.PathLike[str]) -> str | None:
    """Address of the checkpoint that the pointer of a folder or URL names, or None where none was saved.

    A writer that was killed before its first pointer leaves whole checkpoints without one: the newest of them is the latest.
    Raises CheckpointError when the pointer is damaged or names what is not whole; OSError.
    """
    there = place(where)
    with asking(there):
        try:
            pointer = there.read(POINTER)
        except FileNotFoundError:
            step = _newest(there, 1 << 62)
            if step is None and any(name.endswith(".pt") for name in there.names()):
                raise _format_1(there.url) from None
            return None if step is None else _address(there, step)
        found = _POINTER.fullmatch(pointer.decode("latin-1"))
        if found is None:
            if pointer.strip().endswith(b".pt"):
                raise _format_1(there.url)
            raise CheckpointError(f"{_shown(there, POINTER)} names no checkpoint; {_instead(there)}")
        step, digest = int(found[1]), found[2]
        try:
            content = describe(there, step)
        except FileNotFoundError:
            what = f"{_shown(there, POINTER)} names {_name(step)}, which is not there"
            raise CheckpointError(f"{what}; {_instead(there)}") from None
        if digest not in (None, content["sha256"]):
            raise _damaged(there, step, DESCRIPTION, f"it is not the one that {POINTER} names")
        return _address(there, step)


def before(address: str) -> str | None:
    """Address of the newest whole checkpoint that is earlier than this one, in its folder."""
    there, step = _split(address)
    with asking(there):
        earlier = _newest(there, step)
    return None if earlier is None else _address(there, earlier)


def load(address: str | os.PathLike[str], device: torch.device | str = "cpu") -> Checkpoint:
    """The checkpoint of this address (of its tensors or of its JSON), its tensors on `device`.

    The file is held in memory twice while it is read. Raises CheckpointError by name for what is cut, changed, foreign or not
    there, and says which to use instead; OSError.
    """
    there, step = _split(os.fspath(address))
    with asking(there):
        try:
            content = describe(there, step)
            stated, name = content["tensors"], _name(step) + TENSORS
            size = there.size(name)
            if size is None:
                raise FileNotFoundError
            if size != stated["bytes"]:
                raise _damaged(there, step, TENSORS, f"it has {size} bytes, not {stated['bytes']}")
            data = there.read(name)
        except FileNotFoundError:
            raise CheckpointError(f"{_shown(there, step)} is not there; {_instead(there)}") from None
    if hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise _damaged(there, step, TENSORS, "its bytes are not those that were written")
    try:
        tensors = {name: tensor.to(device) for name, tensor in safetensors.torch.load(data).items()}
    except Exception as error:  # of a forger who knows the digests
        raise _damaged(there, step, TENSORS, _line(error)) from error
    return Checkpoint(_address(there, step), step, tensors, content["facts"], content)


def find_checkpoint(path: str | os.PathLike[str]) -> str:
    """Address of a checkpoint: given as such, or the latest of a run's folder, or of a folder of checkpoints; paths or URLs.

    Raises CheckpointError when there is none.
    """
    text = os.fspath(path).rstrip("/")
    if _FILE.fullmatch(text.rpartition("/")[2]) or text.endswith(".pt") or Path(text).is_file():
        return _address(*_split(text))
    for folder in (checkpoint_folder(text, _kept_at(text)), text):
        found = latest(folder)
        if found is not None:
            return found
    raise CheckpointError(
        f"{public_address(text)} holds no checkpoint; give a checkpoint file, or the folder of a run that saved one"
    )


def describe(there: Place, step: int) -> dict[str, Any]:
    """What the JSON of a checkpoint says, checked. Raises FileNotFoundError, or CheckpointError when it is damaged."""
    try:
        return _description(there, step)
    except _LaterFormat as later:
        raise CheckpointError(f"{_shown(there, _name(step) + DESCRIPTION)} {later}") from None
    except _Flaw as flaw:
        raise _damaged(there, step, DESCRIPTION, str(flaw)) from flaw.__cause__


def another_version(where: str, versions: object, error: BaseException) -> CheckpointError:
    """What to raise when a whole checkpoint holds what this version does not take. versions: as its JSON tells them; error: what
    was said of it."""
    reason = " ".join(str(error).partition(";")[0].split())[:300] or type(error).__name__
    said = f"{public_address(where)} holds what this version of cmacc does not take ({reason})"
    return CheckpointError(f"{said}; go on with the one that wrote it{_writer(versions)}, or begin anew in a new folder")


def step_of(address: str) -> int:
    """The step that an address names. Raises CheckpointError when it is none of a checkpoint."""
    return _split(address)[1]


# --- writing ---


def write(there: Place, step: int, tensors: Mapping[str, Tensor], facts: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write the two files of a checkpoint, of tensors on the CPU, and return what its JSON says; `point` comes next.

    facts: JSON. more: further entries beside them. Raises what the file system raises, and leaves neither file then.
    """
    name = _name(step)
    if name + DESCRIPTION in there.names():  # of a run that went on elsewhere: with other tensors it is not whole
        there.remove(name + DESCRIPTION)
    part = there.create(name + TENSORS)
    try:
        _write_tensors(part, tensors)
        part.sync()
        part.publish()
    except BaseException:
        part.discard()
        raise
    content = {
        "format": FORMAT,
        "step": step,
        "saved_at": time.time(),
        "versions": _versions(),
        "tensors": {"bytes": part.bytes, "sha256": part.sha256},
        **more,
        "facts": json.loads(facts),
    }
    content["sha256"] = _digest(content)
    try:
        there.publish(name + DESCRIPTION, json.dumps(content, indent=1).encode() + b"\n")
    except BaseException:
        with contextlib.suppress(Exception):
            remove(there, step)  # it takes up the room that may be missing
        raise
    return content


def point(there: Place, content: Mapping[str, Any]) -> str:
    """Make a checkpoint the latest: the pointer names it. Returns its address. content: of its JSON."""
    there.publish(POINTER, f"{_name(content['step'])} {content['sha256']}\n".encode())
    return _address(there, content["step"])


def remove(there: Place, step: int) -> None:
    """First the JSON, which says that there is a whole one."""
    there.remove(_name(step) + DESCRIPTION)
    there.remove(_name(step) + TENSORS)


def steps(there: Place, suffixes: Collection[str] = (DESCRIPTION,)) -> list[int]:
    """Of the checkpoints in a place, ascending. suffixes: which of their files; the JSON is written last, and removed first."""
    found = (_FILE.fullmatch(name) for name in there.names())
    return sorted({int(file[1]) for file in found if file and file[2] in suffixes})


@contextlib.contextmanager
def asking(there: Place, to: str = "read") -> Iterator[None]:
    """Each kind of bucket has errors of its own; they become one sentence."""
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        said = f"{public_address(there.url)} does not let us {to} ({_line(error)})"
        raise CheckpointError(f"{said}; check the address and the right to {to} there") from error


# --- inside ---


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _address(there: Place, what: int | str) -> str:
    return f"{there.url}/{what if isinstance(what, str) else _name(what) + TENSORS}"


def _shown(there: Place, what: int | str) -> str:
    return public_address(_address(there, what))


def _split(address: str) -> tuple[Place, int]:
    folder, slash, name = address.rpartition("/")
    if name.endswith(".pt"):
        raise _format_1(address)
    found = _FILE.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"{public_address(address)} is not a checkpoint; give a file step-NNNNNNNN{TENSORS}, or the folder of a run"
        )
    return place(folder or slash or "."), int(found[1])


def _kept_at(run: str) -> str:
    """The setting checkpoint.at of a run's folder."""
    try:
        return str(json.loads(place(run).read("config.json"))["checkpoint"]["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _newest(there: Place, below: int) -> int | None:
    """Of the checkpoints before step `below`, the last one whose files are both there and of the right length."""
    for step in reversed([step for step in steps(there) if step < below]):
        with contextlib.suppress(_Flaw, FileNotFoundError):
            if _description(there, step)["tensors"]["bytes"] == there.size(_name(step) + TENSORS):
                return step
    return None


def _instead(there: Place, below: int = 1 << 62) -> str:
    step = _newest(there, below)
    if step is None:
        return f"no {'earlier ' if below < 1 << 62 else ''}checkpoint is there that could be used: begin anew, in a new folder"
    return f"use the one of step {step}: write {_name(step)} into {_shown(there, POINTER)}"


class _Flaw(Exception):
    """What is wrong with a file, before anything else to use was looked for."""


class _LaterFormat(_Flaw):
    """Nothing is wrong with it, but for this version."""


def _description(there: Place, step: int) -> dict[str, Any]:
    data = there.read(_name(step) + DESCRIPTION)
    try:
        content = json.loads(data)
        written = content["sha256"] == _digest({name: value for name, value in content.items() if name != "sha256"})
        form, of, facts, stated = content["format"], content["step"], content["facts"], content["tensors"]
        written = written and isinstance(facts, dict) and {"bytes", "sha256"} <= stated.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Flaw("it is not the JSON of a checkpoint") from error
    if not written:
        raise _Flaw("its content is not what was written")
    if isinstance(form, int) and form > FORMAT:
        said = f"is of format {form}, and this version of cmacc reads {FORMAT}"
        raise _LaterFormat(f"{said}; go on with the one that wrote it{_writer(content.get('versions'))}")
    if form != FORMAT:
        raise _Flaw(f"it is of format {form!r}, and this version of cmacc reads {FORMAT}")
    if of != step:
        raise _Flaw(f"it is of step {of}")
    return dict(content)


def _damaged(there: Place, step: int, suffix: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{_shown(there, _name(step) + suffix)} is damaged or foreign: {reason}; {_instead(there, step)}")


def _format_1(address: str) -> CheckpointError:
    said = f"{public_address(address)} has checkpoints of format 1 (.pt), which this version does not read"
    return CheckpointError(f"{said}; export them with the version that wrote them, and begin a new run")


def _writer(versions: object) -> str:
    return f", cmacc {versions['cmacc']}" if isinstance(versions, dict) and "cmacc" in versions else ""


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "cmacc", "nvidia-dali-cuda130"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write_tensors(part: Part, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors lays them out: length of a header, the header, the bytes; the widest types first, so all are aligned.

    By hand, since the library writes only to a path of this machine and does not hash on the way.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor, begin = tensors[name], end
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is of {tensor.dtype}, which a checkpoint does not hold")
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        data: Any = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        for at in range(0, len(data), _BLOCK):
            part.write(memoryview(data[at : at + _BLOCK]))
