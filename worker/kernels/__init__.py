"""Loops for a CPU, compiled by Numba, for what takes PyTorch many small calls.

The engine takes them by `operators` and `matrix`, the trainer by `operators` and `training`; these
know tensors, the others addresses. `team` runs a loop on PyTorch's threads.
"""

from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]
"""What a loop is told: sizes, and where tensors are."""
