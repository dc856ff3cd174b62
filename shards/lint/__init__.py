"""Is a data set what it says it is? `lint` checks all that it promises; a `Fault` is one sentence: what, where, how to mend."""

from cmacc.shards.lint.data_set import lint
from cmacc.shards.lint.faults import Fault

__all__ = ["Fault", "lint"]
