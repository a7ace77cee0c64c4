"""One launcher per CUDA source, and what they share: the loader, the array checks, the tile choices."""
