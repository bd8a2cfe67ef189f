"""Instruments: sets of samples, and what is measured of them."""
