"""Thin: plan, map, commit. Prefect flows, their parameters and progress, and the `cmacc` command."""
