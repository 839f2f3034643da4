"""The error of a run that cannot begin as it is set up."""


class SetupError(ValueError):
    """Models, data or options do not fit together; the message names what is wrong and the fix."""
