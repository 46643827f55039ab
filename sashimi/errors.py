"""The one exception for what a user can mend; every command turns it into one line."""


class InputError(ValueError):
    """Bad input at a boundary. The message names the file or field, the value, and the remedy."""
