"""Messages for libraries that could not be loaded."""

from __future__ import annotations


def library_memory_problem(error: BaseException | None) -> str | None:
    """Return a message if a library could not be loaded for lack of memory or address space; otherwise None."""
    visited: list[BaseException] = []
    while error is not None and error not in visited:
        visited.append(error)
        texts = ("failed to map segment", "cannot allocate memory", "static TLS")
        if isinstance(error, ImportError | OSError) and any(text.lower() in str(error).lower() for text in texts):
            reason = " ".join(str(error).split())
            return (
                f"the libraries need more memory or address space than this process may take ({reason:.200}); raise "
                "its limit (ulimit -v unlimited, or the job's memory)"
            )
        error = error.__cause__ or error.__context__
    return None
