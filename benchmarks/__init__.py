"""Benchmarks of the losses against eager PyTorch, torch.compile and other libraries. The commands, and what they use:

run.py              times the losses and writes a result file for each
check.py            did a headline row get worse?
accuracy.py         how exact value and gradient are
scaling.py          how cost grows with size
train_steps.py      whole training steps
perceptual_step.py  loss and gradient of images through a network
gpu.py              all that needs a GPU, in parts
plot.py             README's figures, REPORT.md and the pictures
test_suite.py       the headline rows under pytest-benchmark
workloads/          what is timed
harness/            how it is timed, checked and written
report/             what the result files say
"""
