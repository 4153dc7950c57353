"""`fastbound tune`: which tiles to try, the sweep over them, and the table it writes.

Uses `performance` and what is below it.
"""
