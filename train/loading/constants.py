"""Constants of an encoder's input that no setting changes; here, for who has no DALI."""

from __future__ import annotations

PICTURE_MEAN, PICTURE_STD = 0.45 * 255, 0.225 * 255
"""Kinetics' usual constants, the same for all channels: colour jitter makes finer ones meaningless."""
FLOOR_DB = -100.0
"""Of the log-mel, before it is normalised."""
