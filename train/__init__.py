"""Shards in, encoders out: DALI loading, CM-ACC, the loop, checkpoints, evaluation, export.

`from cmacc.train import load_encoder` loads trained encoders, in one line and without DALI; torch is imported only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmacc.train.export.load import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from cmacc.train.export.load import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
