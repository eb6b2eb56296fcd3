"""Exception -> its type and the code locations it passed, without its message, which may quote a client's text."""

from __future__ import annotations

import traceback


def where_from(error: BaseException) -> str:
    """For logs: an exception's type and traceback, without its message."""
    return f"{type(error).__qualname__}\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()
