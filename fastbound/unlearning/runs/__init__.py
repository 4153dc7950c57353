"""The folder of a run, and the state that a resumed run needs.

Uses `data`.
"""
