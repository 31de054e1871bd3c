"""What the benchmarks time, and whose errors they measure.

items.py            a loss, its options, a shape and a dtype
states.py           inputs as training has them, for the errors
providers.py        who computes it: eager, torch.compile, fastloss, other libraries
train_steps.py      whole training steps
perceptual_step.py  loss and gradient through VGG16
"""
