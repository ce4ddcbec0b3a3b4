"""Implementations of each op, one folder a backend, same file name as the op."""
