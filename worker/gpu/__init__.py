"""Kernels of our own on a GPU, in Triton: what stands between the products of a layer.

They stay in the mathematics and in the roundings of the compiled loops (`worker.kernels`), which do
the same on a CPU. Triton comes with the builds of torch for CUDA; ``worker.gpu.operators`` cannot
be imported where it is not.
"""
