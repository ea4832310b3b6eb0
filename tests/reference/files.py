#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/reference/files/ with NumPy and safetensors themselves: what the readers must read,
and, byte for byte, what the writers must write.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6 ml_dtypes==0.6.0 safetensors==0.8.0
    venv/bin/python tests/reference/files.py             # write the files
    venv/bin/python tests/reference/files.py FILE...     # read files that rflow has written
"""

import io
import pathlib
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy

folder = pathlib.Path(__file__).parent / "files"


class Stream(io.RawIOBase):
    """A file that only goes forward."""

    def __init__(self, file):
        self.file = file

    def writable(self):
        return True

    def seekable(self):
        return False

    def write(self, data):
        return self.file.write(data)


def values(dtype):
    """0 to 5 as 2 x 3; every type holds them exactly."""
    return np.arange(6).astype(dtype).reshape(2, 3)


def write():
    folder.mkdir(exist_ok=True)
    types = ["f2", "f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "b1", "c8", "c16"]
    for name in types:
        np.save(folder / f"{name}.npy", values(name))
    np.save(folder / "bfloat16.npy", values(ml_dtypes.bfloat16))
    for name in ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]:
        every = np.arange(256, dtype="u1").view(getattr(ml_dtypes, name)).reshape(16, 16)
        np.save(folder / f"{name}.npy", every)
        np.save(folder / f"{name}_as_f4.npy", every.astype("f4"))
    arrays = {"embed": values("f4"), "block.1": np.asfortranarray(values("f8")), "empty": np.zeros((0, 5), "f4")}
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    with open(folder / "streamed.npz", "wb") as file:
        np.savez(Stream(file), **arrays)  # what cannot be sought has the sizes behind the data
    np.save(folder / "fortran.npy", np.asfortranarray(values("f4")))
    np.save(folder / "three.npy", np.arange(24, dtype="f4").reshape(2, 3, 4))
    np.save(folder / "scalar.npy", np.float32(7))
    np.save(folder / "vector.npy", np.arange(4, dtype="i8"))
    np.save(folder / "empty.npy", np.zeros((0, 5), "f4"))
    for version in [(2, 0), (3, 0)]:
        with open(folder / f"version{version[0]}.npy", "wb") as file:
            np.lib.format.write_array(file, values("f4"), version=version)
    np.save(folder / "big_endian.npy", values(">f4"))
    np.save(folder / "structured.npy", np.zeros(2, [("a", "f4"), ("b", "i4")]))
    np.save(folder / "object.npy", np.array([None, 1]), allow_pickle=True)
    np.save(folder / "text.npy", np.array(["abc"]))
    np.save(folder / "void.npy", np.zeros(2, "V3"))

    tensors = {name: values(name) for name in types if name != "c16"}
    tensors["bf16"] = values(ml_dtypes.bfloat16)
    tensors["scalar"] = np.array(7, "f4")
    tensors["empty"] = np.zeros((0, 5), "f8")
    tensors["f8_e4m3"] = values(ml_dtypes.float8_e4m3fn)
    tensors['n\u00e4me "quoted"'] = values("f4")
    safetensors.numpy.save_file(tensors, folder / "all.safetensors", {"model": "none, \u00e4"})


def read(path):
    print(path)
    if path.endswith(".npy"):
        print(np.load(path))
        return
    with safetensors.safe_open(path, "np") as file:
        print(file.metadata())
        for name in file.keys():
            print(name, file.get_tensor(name).tolist())


for path in sys.argv[1:]:
    read(path)
if len(sys.argv) == 1:
    write()
