"""Which path runs: the device, default tiles, tables of measurements, and the resulting plan.

Uses `truth` and the tile shapes of `kernels`.
"""
