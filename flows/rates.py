"""What was measured of a clip and of a GPU, each figure with where it comes from: the file `rates.json` beside this module.

`infra/bench/rates.py` writes that file from real runs; nobody edits it by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cmacc.shards.options import from_json

FILE = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Rate:
    """A measured figure. value: in `unit`. command: that measures it again. of: what it was measured on. machine: its kind. date:
    ISO, "" where a file of results has its own."""

    value: float
    unit: str
    command: str
    of: str
    machine: str
    date: str = ""

    def source(self) -> str:
        when = f", {self.date}" if self.date else ""
        return f"{self.value:.4g} {self.unit}: `{self.command}`, {self.of}; {self.machine}{when}"


@dataclass(frozen=True)
class ProfileRates:
    """Of one profile at its default settings, for each second of a clip but for `load`.

    stored: bytes of shards, indexes and catalog. read: bytes of the picture and the sound, which is what training asks for.
    transcode: processor seconds of decoding, cutting, encoding and checking. load: processor seconds of one view of the `paper`
    recipe, decoded on a CPU.
    """

    stored: Rate
    read: Rate
    transcode: Rate
    load: Rate


@dataclass(frozen=True)
class Rates:
    """profiles: by name. utilisation: share of the GPU's bf16 peak that a training step's encoders reached, by the GPU's name in
    `cmacc.train.networks.flops.PEAK_TFLOPS`, as "H100"."""

    profiles: dict[str, ProfileRates] = field(default_factory=dict)
    utilisation: dict[str, Rate] = field(default_factory=dict)


@cache
def measured() -> Rates:
    """What the repository has measured."""
    return from_json(Rates, json.loads(FILE.read_text()))
