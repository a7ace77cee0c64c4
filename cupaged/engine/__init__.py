"""The engine: requests, blocks, scheduling. Pure Python; no module here imports CuPy."""
