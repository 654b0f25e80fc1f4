"""The two ways a command ends badly: unusable input, or a check that did not hold."""


class InputError(Exception):
    """Input that cannot be used.

    The message is one line that names the offender, what was expected, what was found and what to do.
    """

    def __init__(self, message: str) -> None:
        """Take a message; line breaks in what it quotes, such as other packages' messages, become spaces."""
        super().__init__(" ".join(message.splitlines()))


class CheckError(Exception):
    """A parity or integrity check ran and did not hold."""
