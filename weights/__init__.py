"""Checkpoints: find or fetch them, read them, pack them for the kernels."""
