"""Vendor GEMMs through ATen, on any device torch has."""
