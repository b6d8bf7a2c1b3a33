"""Triton kernels of the GPU engine, each with a plain PyTorch reference. None is written yet."""
