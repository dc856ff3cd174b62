"""Clips at rest: profiles, WebDataset tars with indexes and a Zarr catalog; writing, re-sharding, ordered reading.

A data set is a directory: `dataset.json`, `clips-NNNNNN.tar` with two indexes each, and `catalog.zarr`. The public face:

`clip.Clip`, `clip.Facts`, `profile.Profile`   what a clip is, and how it is encoded
`writer.DatasetWriter`                         clips in; shards committed one by one, whatever happens
`dataset.Dataset`, `cache.Cache`               a clip's bytes by row or key, from a folder or any fsspec URL
`catalog.Catalog`                              columns of all clips; embeddings can be added (`Dataset.catalog`)
`order.Order`, `mixture.Mixture`, `split.Split`  the global order of samples, of one data set or several
`reshard.reshard`                              filter, subset, merge, order, split, resize, without decoding
`foreign.index_shards`                         tars that others wrote, made a data set where they lie
`lint.lint`, `describe.describe`               is it sound, and what is in it, in numbers
`page.write_page`, `extract.extract`           the same to look at, and some clips as files
`errors.DatasetError`                          what goes wrong, in one sentence

Importing this room imports neither torch nor any of its modules: name the one you need.
"""
