"""Whole models: adapters put in, taken out, explained, sharded, and kept in files.

Uses `layers` and what is below it.
"""
