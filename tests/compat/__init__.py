"""Drop-ins beside the libraries themselves: values, gradients, dtypes, attributes and errors, on drawn calls.

tools.py        a drawn call of both, judged by the one tolerance rule
test_patch.py   swapping and back, and that docs/migration.md has every name
test_alone.py   in a process without the libraries
test_peers.py   the command that runs a library's own tests
test_ecosystem.py   compiled, exported, checkpointed, captured, under autocast and torch.func
test_trainers.py    in Lightning, Accelerate, transformers', sentence_transformers' and open_clip's trainers
test_<library>.py
"""
