"""How the scripts and `onestep` end when they are given what they cannot take."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@contextmanager
def input_errors(program: str) -> Iterator[None]:
    """End `program` with one message and status 2 on a `ValueError`, `OSError` or `RuntimeError` that a `raise` of
    this package (or of the scripts beside the one that runs) states. All others are somebody's bug and keep their
    traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(innermost.filename).resolve()
        script = getattr(sys.modules["__main__"], "__file__", None)
        ours = file.is_relative_to(PACKAGE) or (script is not None and file.parent == Path(script).resolve().parent)
        if not ours or not (innermost.line or "").startswith("raise "):
            raise
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
