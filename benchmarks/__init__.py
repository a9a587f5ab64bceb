"""Measurements of speed and memory, one script per claim; `python -m benchmarks.run` runs them all."""
