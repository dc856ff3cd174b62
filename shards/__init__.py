"""Clips at rest: profiles, WebDataset tars with indexes and a Zarr catalog; writing, re-sharding, ordered reading.

A data set is a directory: `dataset.json`, `clips-NNNNNN.tar` with two indexes each, and `catalog.zarr`.
Start at `dataset.Dataset` (reading) and `writer.DatasetWriter` (writing).
"""
