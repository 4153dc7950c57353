"""What is measured against what: cases, competitors, products, and how they are timed.

Uses fastbound.
"""
