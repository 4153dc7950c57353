"""`fastbound profile`: an adapter against its frozen module and PEFT as sequences grow.

Uses `performance` and fastbound's public names.
"""
