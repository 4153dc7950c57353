"""Who is measured against whom: cases, layers, blocks, products, and how they are timed.

Uses fastbound.
"""
