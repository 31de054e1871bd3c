"""Losses across ranks, gradient caching and the memory bank, on gloo.

cases.py     the losses that are computed, encoders.py the encoders of cached_step
jobs.py      what the ranks do, worker.py starts them as processes
checks.py    what is looked at in what they return
"""
