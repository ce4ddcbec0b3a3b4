"""The compiled C++ kernels of csrc/cpu."""
