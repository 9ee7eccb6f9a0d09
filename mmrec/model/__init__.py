"""Towers, fusion, the encoder and its losses."""
