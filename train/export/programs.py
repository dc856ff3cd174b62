"""Encoders as programs that need none of our code: `torch.export` (.pt2) and ONNX.

A program takes an input of any batch size and gives two outputs: the embedding, unit vectors (B, width), and the features before
the head, (B, feature_width). A .pt2 is a zip: the graph as JSON, each weight as its raw bytes. torch would also put a pickle of
example inputs into it; ours have none, and `load_program` opens no file that has one.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cmacc.train.loading.views import ViewConfig
from cmacc.train.networks.encoders import Encoder

OUTPUTS = ("embedding", "features")
_PICKLES = ("sample_inputs/", "constants/")  # folders of a .pt2 in which torch may put pickles


class _Both(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder.features(x)
        return self.encoder.project(features)[0], features


def example(modality: str, view: ViewConfig, batch: int = 2) -> Tensor:
    """An input of zeros of the shape that an encoder takes."""
    if modality == "video":
        return torch.zeros(batch, 3, view.frames, view.size, view.size)
    return torch.zeros(batch, 1, view.n_mels, view.mel_steps)


def program(encoder: Encoder, modality: str, view: ViewConfig) -> ExportedProgram:
    """The encoder as a graph of torch operators, for any batch size, on the CPU."""
    # weights in torch's plain layout: a program of strided ones is larger, and not all readers take it
    plain = copy.deepcopy(encoder).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain.eval().requires_grad_(False)
    with _quiet(), torch.no_grad():
        made = torch.export.export(_Both(plain), (example(modality, view),), dynamic_shapes=({0: Dim("batch", min=1)},))
    made.example_inputs = None
    return made


def pt2(made: ExportedProgram) -> bytes:
    """A program as the bytes of a .pt2 file, without any pickle."""
    out = io.BytesIO()
    with _quiet():
        torch.export.save(made, out)
    if (pickle := _pickle_in(out)) is not None:
        raise RuntimeError(f"torch {torch.__version__} put a pickle into the program ({pickle}); export without programs")
    return out.getvalue()


def load_program(path: str | os.PathLike[str]) -> nn.Module:
    """The module of a .pt2 file of ours: `embedding, features = load_program(path)(x)`. Runs no code that is in the file.

    Raises ValueError for a file that is none, or holds a pickle; OSError.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        pickle = _pickle_in(data)
        if pickle is None:
            data.seek(0)
            with _quiet():
                return torch.export.load(data).module()
    except Exception as error:  # of a damaged zip, JSON or graph
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{os.fspath(path)} is not a program this version can load ({reason}); export it again") from error
    raise ValueError(
        f"{os.fspath(path)} holds a pickle ({pickle}), which could run any code; take a file that `cmacc export` wrote"
    )


class Unconverted(ValueError):
    """A network that ONNX cannot express."""


def need_onnx() -> None:
    """Raises ValueError with what to install."""
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        raise ValueError("ONNX models need packages that are not installed; run: pip install 'cmacc[onnx]'")


def onnx_model(made: ExportedProgram) -> bytes:
    """A program as an ONNX model: input `input`, outputs `embedding` and `features`. Raises Unconverted."""
    try:
        with _quiet():
            found: Any = torch.onnx.export(made, dynamo=True, input_names=["input"], output_names=list(OUTPUTS), verbose=False)
        return bytes(found.model_proto.SerializeToString())
    except Exception as error:  # whatever the converter makes of an operator that it does not know
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise Unconverted(f"the network does not convert ({reason}); use its .pt2 program") from error


def _pickle_in(file: io.BytesIO) -> str | None:
    """The first part of a .pt2 that torch would unpickle."""
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            name = part.filename
            if "/data/" in name and name.endswith("_config.json"):
                config = json.loads(archive.read(part))["config"]
                if any(entry.get("use_pickle") for entry in config.values()):
                    return name
            elif any(folder in name for folder in _PICKLES) and part.file_size:
                return name
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters talk of their own innards."""
    noisy = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("onnx_ir")
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
