"""Gradient difference: its adapters, its steps, its loop, and the processes it runs in.

Uses `data`, `losses`, `metrics`, `runs` and fastbound's public names.
"""
