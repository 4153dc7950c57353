"""The formula in plain PyTorch, operands to try it on, and the measures of exactness.

Uses torch and no other part of fastbound.
"""
