"""Tars that others wrote, made a data set where they lie: read, looked into, and noted in a catalog; no tar is touched.

`index_shards` does it all. `said.Fields` names where labels, source videos, splits and captions are; `rows.REASONS` says why a
sample may be left out.
"""

from cmacc.shards.foreign.indexing import REPORT, index_shards
from cmacc.shards.foreign.rows import REASONS
from cmacc.shards.foreign.said import Fields

__all__ = ["REASONS", "REPORT", "Fields", "index_shards"]
