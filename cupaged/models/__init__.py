"""The decoder, written once against the operations of a backend."""
