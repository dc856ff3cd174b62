"""Encoders and how they are computed: backbones and heads, BatchNorm over ranks, key encoders, precision and compiler."""
