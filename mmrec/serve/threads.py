"""Threads of numerical libraries beside an event loop."""

import os

# libgomp's, which torch and FAISS compute on, spin between two loops, and OpenBLAS's, which numpy does, for
# 2^26 cycles after a product, some 20 ms.
_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}


def let_idle_threads_sleep() -> None:
    """Have threads that wait for work leave the cores to the event loop, decoders and each other.

    To be called before torch, numpy and FAISS are imported, which read this from the environment; what it
    says already stays.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
