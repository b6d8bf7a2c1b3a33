"""The VQVAE decoder on a CPU by minimal filtering (Winograd): a quarter of the multiplications of its 3×3 convolutions.

`decoder.py` is the network, `convolution.py` one convolution, `kernels.py` its compiled loops.
"""
