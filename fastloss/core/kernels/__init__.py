"""What the Triton kernels of the families share.

launch.py        sizes and options of launches, second stages of sums, the cases of the compile checks
memory_order.py  walking tensors in the order of memory: runs, layouts, broadcasts, offsets
device_math.py   arithmetic inside kernels
tile_table.py    tables of tiles by kind of GPU, the choice of a line and of a tile
matmul.py        products that a library makes, and operands for them
recorder.py      what a launcher does, recorded and replayed (core/plans.py)
plan_source.py   the replay's source, written from the record
c_launch.py      launches through Triton's C launcher
layer_table.py   how a kernel gets the pointers and numbers of many layers
scaled_sum.py    the second stage of sums, times factors (core/scaled_sum.py)
"""
