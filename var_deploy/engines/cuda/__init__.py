"""The decode loop on a GPU without PyTorch: memory, streams and graphs by cuda-python, draws by compiled kernels."""
