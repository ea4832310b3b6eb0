# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, said in one line."""

import sys


class CaptureError(Exception):
    """Something the caller can mend; its text is one line."""


class TooLarge(CaptureError):
    """A value beyond the stored type: what is written so far is of no use, for the cure is another type."""


def note(text):
    print(f"capture.py: note: {text}", file=sys.stderr)


def warn(text):
    print(f"capture.py: warning: {text}", file=sys.stderr)


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error):
    """Whether it is Python's, torch's CPU allocator's or a device's way to say so."""
    # By name: torch may not be there, and older versions have the class elsewhere.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
