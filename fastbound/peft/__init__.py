"""The PEFT method: its config, its layer, and the hook that registers it with PEFT.

Uses `models` and what is below it.
"""
