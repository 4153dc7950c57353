"""`fastbound profile`: adapters compared with the frozen module and with PEFT, by sequence length.

Uses `performance` and fastbound's public names.
"""
