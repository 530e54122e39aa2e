"""One-line messages for the errors that damaged text files cause in the libraries that read them."""

from __future__ import annotations

import csv
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from cfsp.errors import CfspError, DataError, printable


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn errors of the libraries that read files into one line with the way out.

    Args:
        label: how messages name the file.

    Raises:
        DataError: reading inside the context failed.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{label}: cannot be read: it is not UTF-8 (byte 0x{byte:02x}; perhaps Latin-1); save it as UTF-8, e.g. "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error
    except RecursionError as error:
        raise DataError(f"{label}: cannot be read: it is nested too deep; no file of texts is") from error
    except MemoryError as error:  # Arrow raises it too, for sizes that no file of this length can have
        raise DataError(f"{label}: cannot be read: it asks for more memory than there is; fetch it again") from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{label}: cannot be read: its compressed content is damaged or cut off; fetch it again"
        ) from error
    except csv.Error as error:
        raise DataError(
            f"{label}: cannot be read: its cells are not those of a table, or one is larger than any text; "
            "see that quotation marks are closed"
        ) from error
    except CfspError:
        raise
    except Exception as error:  # damaged bytes can raise any error of Arrow, whose messages help no user
        known = isinstance(error, OSError) and error.errno is not None and error.strerror
        reason = (
            printable(str(known))[:160] if known else "its content is damaged, or of a kind that pyarrow cannot read"
        )
        raise DataError(f"{label}: cannot be read ({reason}); see that it is whole, or fetch it again") from error
