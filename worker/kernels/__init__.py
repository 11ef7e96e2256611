"""Loops for a CPU, compiled by Numba, for what takes PyTorch many small calls."""

from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]
"""What a loop is told: sizes, and where tensors are."""
