# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that is written piece by piece, and gone on with after an interruption.

All sizes are known before the first byte, so the whole file is laid out at once beside its target, rows are
put where they belong in any order, and a rename ends it: a reader never meets half a file.

    x.safetensors.partial   the file so far
    x.safetensors.journal   JSON: what the run is, and how many of its batches are on the disk
"""

import json
import os
import struct
import time

from capture_errors import CaptureError, note

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, the rest works
    fcntl = None

SECONDS_BETWEEN_MARKS = 5.0
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1}


def header_of(tensors, metadata):
    """The first bytes of a file of tensors [(name, type, shape)]; also {name: (first byte, bytes a row)}, size.

    Written by hand because the usual writer puts the metadata in a random order, and wants all data at once.
    Tensors are laid in the order given: the widest types first keep all of them aligned.
    """
    entries, places, end = {"__metadata__": metadata}, {}, 0
    for name, kind, shape in tensors:
        row = ITEM_BYTES[kind]
        for extent in shape[1:]:
            row *= extent
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + shape[0] * row]}
        places[name] = (end, row)
        end += shape[0] * row
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > 100_000_000:
        raise CaptureError(f"the header would be {len(text)} bytes, and safetensors allows 100 million")
    start = 8 + len(text)
    places = {name: (start + first, row) for name, (first, row) in places.items()}
    return struct.pack("<Q", len(text)) + text, places, start + end


class PartialFile:
    """The file while it grows. Use it in this order: resume, begin, put and mark for every batch, finish; close always."""

    def __init__(self, path):
        """Take hold of the place, before anything expensive is done.

        Raises CaptureError if one cannot write there, or another capture is writing the same file.
        """
        self.path, self.partial, self.journal = path, path + ".partial", path + ".journal"
        self.done, self.run, self.places, self.file = 0, None, None, None
        self.keep = os.path.exists(self.journal)
        self.marked, self.marked_at = 0, time.monotonic()
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path):
            raise CaptureError(f"{path} is a directory")
        if not os.path.isdir(folder):
            raise CaptureError(f"no such directory: {folder}")
        try:
            self.file = open(self.partial, "r+b" if os.path.exists(self.partial) else "x+b")
        except OSError as error:
            raise CaptureError(f"cannot write {path}: {error.strerror}")
        if fcntl is not None:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise self._busy()
            try:
                mine = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.partial))
            except OSError:
                mine = False
            if not mine:  # the other one has just given it its name
                raise self._busy()

    def resume(self, run, restart=False):
        """Look for an earlier attempt at the same run; its finished batches are in `done` after begin().

        run      {str: str}, what the bytes of the file depend on
        restart  forget an earlier attempt
        Raises CaptureError if the attempt was at another run; what is there stays.
        """
        self.run = run
        if restart:
            self._remove(self.journal)
            self.keep = False
            return
        try:
            with open(self.journal, encoding="utf-8") as file:
                found = json.load(file)
            before, done = dict(found["run"]), int(found["batches"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            note(f"{self.journal} cannot be read: beginning again")
            return
        for key in [*run, *before]:
            if before.get(key) != run.get(key):
                raise CaptureError(f"{self.partial} was begun with another {key} ({str(before.get(key))[:40]}, now {str(run.get(key))[:40]}): "
                                   "give the same arguments to go on, or --restart to begin again")
        self.done = self.marked = max(done, 0)

    def begin(self, tensors, metadata):
        """Lay out the file, or check that the earlier attempt laid out the same one.

        Raises CaptureError if the disk has no room; nothing is left then.
        """
        head, self.places, size = header_of(tensors, metadata)
        try:
            if self.done:
                self.file.seek(0)
                same = os.fstat(self.file.fileno()).st_size == size and self.file.read(len(head)) == head
                if same:
                    return
                note(f"{self.partial} is not what its journal says: beginning again")
            self.done, self.marked, self.keep = 0, 0, False
            self._remove(self.journal)
            self.file.seek(0)
            self.file.truncate(0)
            self.file.write(head)
            self.file.flush()
            try:
                # A disk that is too small is noticed now and not after hours.
                os.posix_fallocate(self.file.fileno(), 0, size)
            except (AttributeError, OSError) as error:
                if getattr(error, "errno", None) in (28, 27, 122):  # no space, file too large, over quota
                    raise
                self.file.truncate(size)
        except OSError as error:
            raise CaptureError(f"cannot write {self.path}: {error.strerror} ({size} bytes)")

    def put(self, name, row, data):
        """Write rows of one tensor from `row` on: bytes, or a C-ordered little-endian array."""
        first, width = self.places[name]
        try:
            self.file.seek(first + row * width)
            self.file.write(memoryview(data).cast("B"))
        except OSError as error:
            raise CaptureError(f"cannot write {self.path}: {error.strerror}" + self.cure())

    def mark(self, batches, now=False):
        """That many batches are complete. The journal learns of it every few seconds, for the disk has to follow."""
        self.done = max(self.done, batches)
        if self.run is None or self.done == self.marked:
            return
        if not now and time.monotonic() - self.marked_at < SECONDS_BETWEEN_MARKS:
            return
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            with open(self.journal + ".new", "w", encoding="utf-8") as file:
                json.dump({"run": self.run, "batches": self.done}, file, ensure_ascii=False, indent=1)
            os.replace(self.journal + ".new", self.journal)
        except OSError as error:
            raise CaptureError(f"cannot write {self.journal}: {error.strerror}")
        self.marked, self.marked_at, self.keep = self.done, time.monotonic(), True

    def cure(self):
        """The end of a message: how to go on from here; empty if nothing is there yet."""
        return f" ({self.marked} batches are done: the same command goes on from there)" if self.keep and self.marked else ""

    def finish(self):
        """Give the file its name."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            if fcntl is None:  # where an open file cannot be renamed
                self.file.close()
            os.replace(self.partial, self.path)
            self.file.close()
        except OSError as error:
            raise CaptureError(f"cannot write {self.path}: {error.strerror}")
        self.file = None
        self._remove(self.journal)

    def close(self, keep=None):
        """Let go. What was begun stays if the journal knows of it, unless keep is False."""
        if self.file is None:
            return
        if keep is False:
            self.keep = False
        try:
            self.file.close()
        except OSError:
            pass
        self.file = None
        if not self.keep:
            self._remove(self.partial)
            self._remove(self.journal)

    def _busy(self):
        self.file.close()
        self.file = None
        return CaptureError(f"another capture is writing {self.path}")

    @staticmethod
    def _remove(path):
        try:
            os.unlink(path)
        except OSError:
            pass
