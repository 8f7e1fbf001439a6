"""The fused runner's own CPU kernels: C++ built on first use, called through ctypes."""
