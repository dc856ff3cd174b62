"""Shards in, encoders out: DALI loading, CM-ACC, the loop, checkpoints, evaluation, export."""
