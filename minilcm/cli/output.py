"""Printing never stops the program, and an error is printed as one line."""

import io
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable


class Output(io.TextIOWrapper):
    """Text for a reader who may go away: from then on it goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.go_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.go_nowhere(error)

    def go_nowhere(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self is sys.stdout and not isinstance(error, BrokenPipeError):  # `| head` needs no word
            print(f"nothing more can be printed ({error.strerror})", file=sys.stderr)


def plain_output() -> None:
    """From here on no print raises: not after `| head`, nor on a full disk, nor for odd letters."""
    for name in ("stdout", "stderr"):
        # None where the program was started without
        stream = getattr(sys, name) or open(os.devnull, "w")
        how = dict(encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, Output(stream.detach(), **how))


def run_script(
    name: str, main: Callable[[Namespace], None], parse: Callable[[], Namespace], stopped: str
) -> None:
    """Parse and run `main`; an error, or Ctrl-C (`stopped`), is one line and exit 1."""
    plain_output()
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's, below its error
    try:
        main(parse())
    except OSError as error:  # Python's own words: [Errno 17] File exists: 'x'
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        sys.exit(f"{name}: {what}")
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")
    except (RuntimeError, MemoryError) as error:  # torch's, on a GPU or a CPU; Python's
        what = str(error).split("\n")[0][:200]
        in_words = re.search("out of memory|allocate memory", what)
        if not isinstance(error, MemoryError) and not in_words:
            raise
        sys.exit(f"{name}: out of memory; a smaller --size or --batch needs less ({what})")
