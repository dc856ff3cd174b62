"""What encoders can do: labelled data sets in their published layouts, features, probes, fine-tuning, retrieval."""
