"""The one error of this room."""


class DatasetError(Exception):
    """What is wrong with a data set, where, and how to mend it, in one sentence."""
