"""Tens of thousands of images of a bundle as PNG files: restartable, in shards, on several GPUs, as one .npz.

`run.py` is the file to read first. `plan.py` says what every image is; nothing else decides it.
"""
