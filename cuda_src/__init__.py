"""The CUDA C sources, as package data: one family of kernels a .cu file, what they share in .cuh files."""
