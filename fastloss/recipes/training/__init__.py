"""What a training loop needs, whatever it trains.

checkpoint.py  checkpoints, written whole or not at all
metrics.py     a CSV row per step, and TensorBoard
interrupt.py   Ctrl-C and SIGTERM, which end a run after a step
"""
