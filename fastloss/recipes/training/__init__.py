"""What a training loop needs, whatever it trains.

run.py         the base of the trainers: the loop, going on with a run
world.py       the ranks of a run, and what they decide together
shared_batch.py  means over a batch that the ranks share
noise.py       random numbers that do not depend on the number of ranks
checkpoint.py  checkpoints, written whole or not at all
sharded.py     those that several ranks write
metrics.py     a CSV row per step, and TensorBoard
options.py     fields and checks of configurations
pictures.py    grids of images
progress.py    the progress bar of rank 0
run_folder.py  where a run may write, and what a killed one left
interrupt.py   Ctrl-C and SIGTERM, which end a run after a step
"""
