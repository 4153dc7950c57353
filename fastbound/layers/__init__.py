"""Modules: the adapter, the layers and MLP blocks that carry it, and replacing one by another.

Uses `truth`, `dispatch` and `operator`.
"""
