"""Triton kernels, one file per family: formula, layouts, plain reference, kernel, public function.

Imported only where a CUDA device is used (or Triton's interpreter in tests): a CPU build of torch
comes without Triton.
"""
