"""Benchmarks: `pytest benchmarks/ --benchmark-only`. See NOTES.md for how they measure."""
