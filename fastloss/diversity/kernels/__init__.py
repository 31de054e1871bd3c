"""Triton kernels of the losses against repetition.

nearest.py                  the search for the nearest bank row
bank_distance.py            the distance from a whole bank: soft-min and mean
bank_distance_gradients.py  its gradient: sums over the bank of weighted signs or differences
mode_seeking.py             two images of a condition and their noises
pair_distances.py           the rows of a batch from one another
bank_tile.py                a tile of the bank as the kernels read it, and distances of its rows
"""
