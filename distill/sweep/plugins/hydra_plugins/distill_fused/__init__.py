"""Hydra looks here for `hydra/launcher=fused`."""
