"""Trained encoders for use elsewhere: weights, the constants of their input, programs, a model card."""
