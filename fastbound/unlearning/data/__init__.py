"""Rows to forget and to retain: read, checked, encoded and drawn.

Uses `fastbound.errors` alone.
"""
