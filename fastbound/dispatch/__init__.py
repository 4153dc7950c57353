"""Which path runs: the device, default tiles, tables of measurements, and the plan made of them.

Uses `truth` and the tile shapes of `kernels`.
"""
