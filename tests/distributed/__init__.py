"""Losses across ranks, gradient caching and the memory bank, on gloo.

cases.py     the losses that are computed, encoders.py the encoders of cached_step
jobs.py      what the ranks do, worker.py starts them as processes
banks.py     a bank of images that lies on several ranks: what they do, and what is looked at
checks.py    what is looked at in what they return
"""
