"""An encoder under a linear classifier, trained on labelled files an epoch at a time, and asked about others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cmacc.train.evaluation.examples import Examples, ahead
from cmacc.train.export.trained import Trained
from cmacc.train.loading.views import ViewConfig, generator
from cmacc.train.networks.compute import ComputeConfig, autocast

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class FinetuneConfig:
    """METHOD's first protocol by default; `sgd()` is the other.

    optimiser: adam or sgd (momentum .9). rate_head, rate_base: of the classifier and of the encoder. head_epochs: the first ones,
    in which the encoder stays as it is. epochs: in all; 0: chosen on the training rows, up to most_epochs. frames: of a view of a
    video, which then spans as much longer. batch: files a step. views, crops: of each file at test: so many in time, each cut
    so often (of a sound only views). seed: of order, augmentation and the classifier's first weights.
    """

    optimiser: Literal["adam", "sgd"] = "adam"
    rate_head: float = 1e-4
    rate_base: float = 1e-4
    head_epochs: int = 5
    epochs: int = 0
    most_epochs: int = 30
    frames: int = 32
    batch: int = 32
    views: int = 10
    crops: int = 3
    weight_decay: float = 0.0
    seed: int = 0

    @staticmethod
    def sgd(**changes: Any) -> FinetuneConfig:
        """The second protocol: SGD from the first epoch on, the classifier ten times as fast as the encoder."""
        return replace(FinetuneConfig("sgd", 0.0025, 0.00025, 0), **changes)

    def __post_init__(self) -> None:
        if self.optimiser not in ("adam", "sgd"):
            raise ValueError(f"finetune.optimiser is {self.optimiser!r}; use adam or sgd")
        for name in ("rate_head", "rate_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"finetune.{name} is {getattr(self, name)}; give a learning rate above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"finetune.weight_decay is {self.weight_decay}; give 0 or more")
        for name in ("head_epochs", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"finetune.{name} is {getattr(self, name)}; give 0 or more")
        for name in ("frames", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune.{name} is {getattr(self, name)}; give 1 or more")
        if self.batch < 2:
            raise ValueError(f"finetune.batch is {self.batch}; give 2 or more, for features are standardised by their batch")
        if self.crops not in (1, 3):
            raise ValueError(f"finetune.crops is {self.crops}; give 1, the middle, or 3, both ends too")
        if self.most_epochs <= self.head_epochs:
            said = f"finetune.most_epochs is {self.most_epochs}, and finetune.head_epochs {self.head_epochs}"
            raise ValueError(f"{said}; give more epochs than those in which the encoder stays as it is")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"finetune.seed is {self.seed}; give 0 or more, below 2^63")

    @property
    def total(self) -> int:
        """Epochs that `finetune` runs through at most, those for choosing included: what its progress counts."""
        return self.epochs or 2 * self.most_epochs


def looking(examples: Examples, view: ViewConfig, config: FinetuneConfig) -> Examples:
    """The same files, a video by views of `config.frames` frames as dense as before; what did not decode stays left out."""
    if examples.labelled.kind == "video":
        view = replace(view, frames=config.frames, view_s=view.view_s * config.frames / view.frames)
    seen = Examples(examples.labelled, replace(view, second="none"), examples.loader)
    seen.left_out = examples.left_out  # one dict: who reports it hears of what is met here
    return seen


class Classifier(nn.Module):
    """A copy of the encoder, standardised features, and a linear layer; with its optimiser."""

    def __init__(self, trained: Trained, examples: Examples, classes: int, config: FinetuneConfig) -> None:
        super().__init__()
        self.classes = classes
        own = trained.audio if examples.labelled.kind == "audio" else trained.video
        self.encoder = copy.deepcopy(own).requires_grad_(True)
        self.encoder.head.requires_grad_(False)  # features are taken before it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator("finetune", config.seed, "classifier").integers(2**62)))
            self.classifier = nn.Sequential(
                nn.BatchNorm1d(own.feature_width, affine=False), nn.Linear(own.feature_width, classes)
            )
        self.device = torch.device("cuda" if examples.loader.dali_device == "gpu" else "cpu")
        self.to(self.device)
        groups = [
            {"params": list(self.classifier.parameters()), "lr": config.rate_head},
            {"params": list(self.encoder.backbone.parameters()), "lr": config.rate_base},
        ]
        decay = config.weight_decay
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(groups, weight_decay=decay)
            if config.optimiser == "adam"
            else torch.optim.SGD(groups, lr=config.rate_head, momentum=0.9, weight_decay=decay)
        )

    def forward(self, x: Tensor) -> Tensor:
        with autocast(ComputeConfig(), self.device):
            features = self.encoder.features(x.to(self.device))
        logits: Tensor = self.classifier(features.float())
        return logits

    def learn(self, x: Tensor, codes: Tensor, head_alone: bool) -> float:
        """One step. With head_alone the encoder, its running statistics too, stays as it is."""
        self.train()
        self.encoder.train(not head_alone)
        self.encoder.backbone.requires_grad_(not head_alone)
        loss = nn.functional.cross_entropy(self(x), codes.to(self.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())


def one_epoch(
    network: Classifier,
    examples: Examples,
    rows: Rows,
    codes: Rows,
    epoch: int,
    config: FinetuneConfig,
    say: Callable[[str], None],
) -> None:
    """All training rows once, in an order of the epoch's own. codes: classes of all files. say: told of each batch.

    Raises ValueError when those that decode are not of two classes.
    """
    rows = _decodable(examples, rows)
    if len(np.unique(codes[rows])) < 2:
        raise ValueError(f"{len(rows)} training files decode, and are not of two classes; fine-tuning needs files of both")
    order = generator("finetune", config.seed, "order", epoch).permutation(rows)
    chunks = np.array_split(order, -(-len(order) // config.batch))  # as even as can be: none is of a single file
    made = ahead(_views(examples, chunk, config.seed, epoch) for chunk in chunks)
    for number, (there, inputs) in enumerate(made, start=1):
        if len(there) < 2:
            continue
        loss = network.learn(inputs, torch.from_numpy(codes[there]), head_alone=epoch < config.head_epochs)
        say(f"epoch {epoch + 1}, batch {number} of {len(chunks)}, loss {loss:.2f}")


def _views(examples: Examples, rows: Rows, seed: int, epoch: int) -> tuple[Rows, Tensor]:
    """Training views of those files that decode."""
    while True:
        there = _decodable(examples, rows)
        try:
            return there, examples.training(there.tolist(), seed, epoch) if len(there) else torch.empty(0)
        except ValueError:
            if len(_decodable(examples, rows)) == len(there):
                raise


def _decodable(examples: Examples, rows: Rows) -> Rows:
    bad = examples.left_out
    return np.array([row for row in rows.tolist() if examples.labelled.file_name(row) not in bad], dtype=np.int64)


@torch.no_grad()
def told(network: Classifier, examples: Examples, rows: Rows, views: int, crops: int) -> NDArray[np.float32]:
    """Mean softmax over views and crops, (m, classes); NaN where a file does not decode."""
    network.eval()
    place = {row: at for at, row in enumerate(rows.tolist())}
    found = np.full((len(rows), network.classes), np.nan, np.float32)
    for there, inputs in examples.central(rows.tolist(), views, crops if examples.labelled.kind == "video" else 1):
        likely = network(inputs.flatten(0, 1)).softmax(1).unflatten(0, inputs.shape[:2]).mean(1)
        found[[place[row] for row in there.tolist()]] = likely.cpu().numpy()
    return found
