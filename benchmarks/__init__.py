"""Benchmarks of the losses against eager PyTorch, torch.compile and other libraries."""
