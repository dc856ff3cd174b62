"""From shards to batches of views: which clips (`sampler`), how to look at them (`views`), and one DALI `graph`."""
