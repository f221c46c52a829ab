"""What the CPU kernels share: raw memory inside Numba code, the threads that run it, and where weights lie."""
