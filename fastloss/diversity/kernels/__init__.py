"""Triton kernels of the losses against repetition.

nearest.py     the search for the nearest bank row
bank_tile.py   a tile of the bank as the kernels read it, and exact distances of its rows
"""
