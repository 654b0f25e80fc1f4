"""The two ways a command ends badly: unusable input, or a check that did not hold."""


class InputError(Exception):
    """Input that cannot be used: the message names the offender, what was expected and what to do."""


class CheckError(Exception):
    """A parity or integrity check ran and did not hold."""
