"""Where the KV cache lives, and how much of it there may be."""
