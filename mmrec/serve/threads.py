"""Threads of numerical libraries beside an event loop."""

import os

# libgomp's, which torch and FAISS compute on, spin between two loops. OpenBLAS's, which numpy does, spin for
# 20 ms after a product, and all wait for the one that has no core: a batch is too small to be shared so.
_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


def let_idle_threads_sleep() -> None:
    """Have threads that wait for work leave the cores to the event loop, decoders and each other.

    Those of numpy's BLAS cannot, so it has one.

    To be called before torch, numpy and FAISS are imported, which read this from the environment; what it
    says already stays.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
