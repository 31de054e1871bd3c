"""What the benchmarks time.

items.py            a loss, its options, a shape and a dtype
providers.py        who computes it: eager, torch.compile, fastloss, other libraries
train_steps.py      whole training steps
perceptual_step.py  loss and gradient through VGG16
"""
