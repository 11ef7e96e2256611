"""``python -m worker.kernels``: compile all loops, which later processes then find ready."""

import torch

from worker.kernels import cache, operators, training

for each in (torch.bfloat16, torch.float32):
    operators.compile_(each)
    training.compile_(each)
cache.mark_complete()
