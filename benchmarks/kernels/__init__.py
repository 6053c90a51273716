"""Kernels alone, against what torch offers."""
