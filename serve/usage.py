"""The error that every command of this room tells in one sentence, with exit code 2."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what to do."""
