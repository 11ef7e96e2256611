"""Loops for a CPU, compiled by Numba, for what takes PyTorch many small calls."""
