"""Towers, fusion, the encoder and its losses."""

import warnings

from tqdm import TqdmWarning

# What the towers are made of imports this, which in a notebook asks for ipywidgets; bars do without.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)
    import tqdm.auto  # noqa: F401
