"""What a training loop needs, whatever it trains.

checkpoint.py  checkpoints, written whole or not at all
metrics.py     a CSV row per step, and TensorBoard
run_folder.py  where a run may write, and what a killed one left
interrupt.py   Ctrl-C and SIGTERM, which end a run after a step
"""
