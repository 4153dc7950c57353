"""Modules: the adapter, the layers and MLP blocks that carry it, and one layer for another.

Uses `truth`, `dispatch` and `operator`.
"""
