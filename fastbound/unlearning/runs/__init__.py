"""The folder of a run, the state that a resumed run needs, and the report of finished runs.

Uses `data`.
"""
