"""Saved figures as tables and pictures: the README's, a file's summary, a comparison of two.

Uses fastbound.
"""
