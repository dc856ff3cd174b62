"""Fine-tuning: the video or the audio encoder trained further on labelled files. What is tested has no say in any setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmacc.train.evaluation.examples import Examples
from cmacc.train.evaluation.tuning import Classifier, FinetuneConfig, Rows, looking, one_epoch, told
from cmacc.train.export.trained import Trained
from cmacc.train.loading.views import generator

__all__ = ["FinetuneConfig", "choose_epochs", "finetune", "set_aside"]

Progress = Callable[[int, str], None]
INNER = 5
"""Of the training rows one in so many is set aside to choose the epochs by, where folds do not say which."""


def finetune(
    trained: Trained,
    examples: Examples,
    train_rows: Sequence[int] | Rows,
    test_rows: Sequence[int] | Rows,
    labels: ArrayLike,
    config: FinetuneConfig,
    on_progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Train a copy of the encoder of `examples`' kind on the training rows, and say how likely each class is for the test rows.

    labels: of all files (n,), numbers or names. Returns the mean over views and crops of the softmax, (m, classes), classes in
    sorted order; NaN for a file that does not decode. With `config.epochs` of 0 they are chosen first, see `choose_epochs`.
    On a CPU a pure function of its arguments. on_progress: called with epochs that are done, of `config.total`, and what goes on.
    Raises ValueError when the training rows that decode are fewer than two, or all of one class.
    """
    tell, begun = on_progress or _nobody, 0
    if not config.epochs:
        begun = config.most_epochs
        config = replace(config, epochs=choose_epochs(trained, examples, train_rows, labels, config, tell))
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    seen = looking(examples, trained.view, config)
    network = Classifier(trained, seen, len(classes), config)
    for epoch in range(config.epochs):
        one_epoch(network, seen, np.asarray(train_rows), codes, epoch, config, partial(tell, begun + epoch))
    tell(begun + config.epochs, "testing")
    return told(network, seen, np.asarray(test_rows), config.views, config.crops)


def choose_epochs(
    trained: Trained,
    examples: Examples,
    train_rows: Sequence[int] | Rows,
    labels: ArrayLike,
    config: FinetuneConfig,
    on_progress: Progress | None = None,
) -> int:
    """The number of epochs after which most of the rows set aside are told rightly, by their central view; of equals the least.

    One fold of the training rows is set aside, or one row in INNER of each class where they are of one fold alone. At least one
    epoch trains the encoder. Raises ValueError as `finetune` does.
    """
    tell = on_progress or _nobody
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    seen = looking(examples, trained.view, config)
    learning, aside = set_aside(np.asarray(train_rows), codes, examples.labelled.folds, config.seed)
    network = Classifier(trained, seen, len(classes), config)
    right = []
    for epoch in range(config.most_epochs):
        one_epoch(network, seen, learning, codes, epoch, config, partial(tell, epoch))
        likely = told(network, seen, aside, 1, 1)
        there = np.isfinite(likely).all(1)
        right.append(int((likely[there].argmax(1) == codes[aside][there]).sum()))
    first = config.head_epochs
    return first + 1 + int(np.argmax(right[first:]))


def set_aside(rows: Rows, codes: Rows, folds: Rows, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to choose by: of the training rows alone, by fold, or drawn from each class."""
    own = np.unique(folds[rows])
    if len(own) > 1:
        inner = folds[rows] == own[int(generator("finetune", seed, "fold").integers(len(own)))]
    else:
        inner = np.zeros(len(rows), dtype=bool)
        for code in np.unique(codes[rows]):
            of_class = np.flatnonzero(codes[rows] == code)
            drawn = generator("finetune", seed, "aside", int(code)).permutation(of_class)
            inner[drawn[: len(of_class) // INNER]] = True
    if not inner.any() or inner.all():
        raise ValueError(
            f"{len(rows)} training files are too few to choose the epochs by; give the number of epochs (finetune.epochs)"
        )
    return rows[~inner], rows[inner]


def _nobody(done: int, note: str) -> None: ...
