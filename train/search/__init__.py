"""Embeddings of whole data sets, and the clips nearest to one, across modalities."""
