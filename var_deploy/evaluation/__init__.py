"""Images beside reference images → FID, sFID, Inception score, precision and recall, as guided-diffusion defines them.

`evaluate.py` is the file to read first. `metrics.py` needs NumPy alone; what runs the network needs PyTorch.
"""
