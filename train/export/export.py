"""A run's encoders as a folder for use elsewhere: weights, programs, card."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cmacc.shards.place import place, public_address
from cmacc.train.export.card import model_card
from cmacc.train.export.folder import DESCRIPTION, WEIGHTS, write_export
from cmacc.train.export.programs import Unconverted, need_onnx, onnx_model, program, pt2
from cmacc.train.export.trained import MODALITIES, load_trained

CARD = "README.md"


@dataclass
class Made:
    """files: names that were written, and what each is. notes: sentences about what could not be."""

    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    programs: bool = True,
    onnx: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Made:
    """Write the encoders of a run, a checkpoint or an older export into a folder or an fsspec URL, over what was there.

    programs: a `torch.export` program of each encoder too; onnx: an ONNX model of each, where it converts. on_progress: told what
    is begun. Raises CheckpointError, ValueError (also when onnx is asked for and not installed), OSError.
    """
    if onnx:
        need_onnx()
    trained, there, made = load_trained(run), place(out), Made()
    if there.size(CARD) is not None and there.size(DESCRIPTION) is None:
        raise ValueError(f"{public_address(there.url)} has a {CARD} that is of no export; give a folder of its own")
    for name in MODALITIES:  # of other weights, perhaps
        there.remove(f"{name}.pt2")
        there.remove(f"{name}.onnx")
    on_progress("weights")
    write_export(trained, out)
    made.files |= {WEIGHTS[name]: f"weights of the {name} encoder" for name in MODALITIES}
    made.files[DESCRIPTION] = "architecture, constants of the input, versions, origin"
    for name in MODALITIES if programs or onnx else ():
        on_progress(f"program of the {name} encoder")
        graph = program(getattr(trained, name), name, trained.view)
        if programs:
            there.publish(f"{name}.pt2", pt2(graph))
            made.files[f"{name}.pt2"] = f"the {name} encoder as a `torch.export` program: no pickle in it, any batch size"
        if onnx:
            on_progress(f"ONNX model of the {name} encoder")
            try:
                there.publish(f"{name}.onnx", onnx_model(graph))
                made.files[f"{name}.onnx"] = f"the {name} encoder as an ONNX model, any batch size"
            except Unconverted as error:
                made.notes.append(f"{name}.onnx was not written: {error}")
    made.files[CARD] = "this card"
    there.publish(CARD, model_card(trained, run, made.files, made.notes).encode())
    return made
