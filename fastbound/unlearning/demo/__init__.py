"""The demonstration: a small model learns rows and forgets some, bounded and not.

Uses `training` and what is below it.
"""
