"""cmacc: from a list of YouTube clips to a pretrained audio-visual encoder.

The four rooms live at the top of the repository (`ingest/`, `shards/`, `train/`, `flows/`); the links
beside this file make them importable as `cmacc.ingest` and so on, so that a bare `train` or `tests`
never shadows anything in the environment they are installed into.
"""

__version__ = "0.1.0"
