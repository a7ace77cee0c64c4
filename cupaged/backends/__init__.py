"""The operations of the forward pass: `reference` in NumPy, `cuda` as launches of our kernels."""
