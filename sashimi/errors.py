"""The exception for what a user can mend, which every command turns into one line, and others between modules."""


class InputError(ValueError):
    """Bad input at a boundary. The message names the file or field, the value, and the remedy."""


class LostWorker(InputError):
    """A process that reads batches was killed, for want of memory mostly. All ranks raise it together."""


class Unavailable(Exception):
    """Why an engine cannot run a model here; another can."""


def first_reason(error: Exception) -> str:
    """The first line of what went wrong first: a CUDA graph whose recording is cut short fails once more as it ends."""
    return str(error.__context__ or error).partition("\n")[0]


def one_line(text: str, longest: int = 1000) -> str:
    """`text` as one line that any terminal can show: control characters and broken Unicode escaped, its middle cut out.

    Names of files and members come from strangers and may hold anything.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= longest else f"{shown[: longest // 2]} ... {shown[-longest // 2 :]}"
