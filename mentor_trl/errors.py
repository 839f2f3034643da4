"""Errors whose message alone tells a user what to do."""


class SetupError(ValueError):
    """Models, data or options do not fit together; the message names what is wrong and the fix."""


class EngineError(RuntimeError):
    """An engine failed for good, and not by what it was asked."""
