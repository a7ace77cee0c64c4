"""The errors a caller can mend. Their messages are one line: what is wrong, where, and what to do about it.

Wrong arguments are plain `ValueError`s (the command line turns them into exit code 2); everything below is a
failure of the surroundings (exit code 1).
"""


class CupagedError(Exception):
    """Base of every failure that cupaged explains."""


class ModelNotFoundError(CupagedError):
    """No model of that name or at that path, or it can't be fetched."""


class CheckpointError(CupagedError):
    """A model's files are damaged, incomplete or of a kind that cupaged does not read."""


class DeviceError(CupagedError):
    """The device that was asked for can't be used."""


class OutOfMemoryError(CupagedError):
    """Too little memory; the message says how much was wanted, how much is free and which option lowers it."""


class QueueFullError(CupagedError):
    """As many requests wait as max_queue_len allows; the caller may try again later."""
