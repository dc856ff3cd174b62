"""A run's curves as an artifact of its flow run: loss beside chance, and held-out retrieval, in one small picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cmacc.flows.tracked import under_prefect


def show_curves(records: Sequence[dict[str, Any]]) -> None:
    """Put the picture beside the flow run, if there is one. A server that is briefly away must not stop the work."""
    if under_prefect() and records:
        with suppress(Exception):
            from prefect.artifacts import create_markdown_artifact

            create_markdown_artifact(key="pretrain-curves", markdown=curves(records))


def curves(records: Sequence[dict[str, Any]]) -> str:
    """Markdown with the picture in it. records: of `metrics.jsonl`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from cmacc.train.report.picture import draw_losses, draw_retrieval

    mpl.use("Agg")
    figure, file = Figure(figsize=(9, 3.2), layout="constrained"), io.BytesIO()
    left, right = figure.subplots(1, 2)
    draw_losses(left, records)
    draw_retrieval(right, records)
    figure.savefig(file, dpi=70, format="png")
    picture = base64.b64encode(file.getvalue()).decode()
    return f"Step {records[-1]['step']}\n\n![loss beside chance, and held-out retrieval](data:image/png;base64,{picture})\n"
