"""Spiking networks for other programs."""

from .nir import mlp_to_nir


__all__ = ["mlp_to_nir"]
