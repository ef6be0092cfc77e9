"""Layers of many small MLPs at once: the GPU kernels that critics' towers and classifiers share."""
