"""What the CPU kernels share: raw memory inside Numba code, and the threads that run it."""
