"""Rows to forget and to retain: reading, checking, encoding and sampling them.

Uses only `fastbound.errors`.
"""
