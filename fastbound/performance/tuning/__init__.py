"""`fastbound tune`: the tiles to try, the sweep over them, and the table that it writes.

Uses `performance` and what is below it.
"""
