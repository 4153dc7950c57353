"""The demonstration: a small model learns rows and forgets some, with a bound and without.

Uses `training` and what is below it.
"""
