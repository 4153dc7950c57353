"""The losses of unlearning, and cross-entropy from whole logits or in chunks.

Uses `data`.
"""
