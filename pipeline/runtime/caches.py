"""The cache of the Hugging Face libraries, where a download cannot be kept in it."""

import errno
from pathlib import Path

from huggingface_hub.constants import HF_HOME

_CANNOT_BE_WRITTEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


def cache_fault(error: BaseException, cache: Path, variable: str) -> str | None:
    """What is wrong with `cache`, where that is why a library raised `error`; None where it is something else.

    Args:
        variable: the environment variable that names the cache.
    """
    for cause in causes_of(error):
        if isinstance(cause, OSError) and cause.errno in _CANNOT_BE_WRITTEN:
            place = Path(str(cause.filename)) if cause.filename is not None else cache
            if any(root in (place, *place.parents) or place in root.parents for root in (cache, Path(HF_HOME))):
                return (
                    f"the Hugging Face cache {cache} cannot be written ({cause.strerror}). Make room or give rights "
                    f"there, or set {variable} (or HF_HOME for all caches) to a folder that can be written."
                )
    return None


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from or while handling, the outermost first."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def root_of(error: BaseException) -> str:
    """The error everything began with, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
