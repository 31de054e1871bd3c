"""Losses across ranks, on gloo: cases.py (what is computed), jobs.py (what the ranks do), worker.py (starts them)."""
