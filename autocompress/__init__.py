"""Compress a trained network into a file that is within a budget, and say how good that is."""

__version__ = "0.1.0"
