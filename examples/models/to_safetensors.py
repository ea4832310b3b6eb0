#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint's pytorch_model.bin, or its parts, as safetensors files beside them.

    pip install torch safetensors
    python to_safetensors.py FOLDER

Names, shapes and types stay as they are, so that both transformers and mamba_ssm checkpoints work. Nothing is
overwritten, and the old files stay.
"""
import argparse
import json
import os
import sys

import torch
from safetensors.torch import save_file

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("folder")
folder = arguments.parse_args().folder


def new_name(file):
    return file.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def write(path, save):
    """Calls save(path), and leaves no half of a file behind."""
    part = f"{path}.tmp-{os.getpid()}"
    try:
        save(part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def convert(file):
    """Returns the bytes of the tensors by name."""
    path = os.path.join(folder, file)
    for mapped in (True, False):  # the older format cannot be mapped
        try:  # only tensors: what else a pickle may hold is not run
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except Exception as error:  # a damaged file raises whatever its bytes lead to
            if not mapped:
                sys.exit(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if not isinstance(loaded, dict):
        sys.exit(f"{path}: no table of tensors")
    tensors, seen = {}, set()
    for name, x in loaded.items():
        if not isinstance(x, torch.Tensor):
            sys.exit(f"{path}: '{name}' is no tensor")
        shared = x.untyped_storage().data_ptr() in seen
        seen.add(x.untyped_storage().data_ptr())
        tensors[name] = x.clone() if shared else x.contiguous()
    write(os.path.join(folder, new_name(file)), lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    return {name: x.numel() * x.element_size() for name, x in tensors.items()}


single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"
if os.path.exists(os.path.join(folder, single)):
    files, listing = [single], None
elif os.path.exists(os.path.join(folder, index)):
    with open(os.path.join(folder, index), encoding="utf-8") as text:
        files = sorted(set(json.load(text)["weight_map"].values()))
    listing = os.path.join(folder, "model.safetensors.index.json")
    for file in files:
        if os.path.basename(file) != file or new_name(file) == file:
            sys.exit(f"{os.path.join(folder, index)}: '{file}' is no file of this folder")
else:
    sys.exit(f"{folder}: neither {single} nor {index} in it")
for path in [os.path.join(folder, new_name(file)) for file in files] + [listing] * (listing is not None):
    if os.path.exists(path):
        sys.exit(f"{path}: exists")

sizes, places = {}, {}
for file in files:
    found = convert(file)
    sizes.update(found)
    places.update(dict.fromkeys(found, new_name(file)))
    print(os.path.join(folder, new_name(file)))
if listing is not None:
    def save(part):
        with open(part, "w", encoding="utf-8") as text:
            json.dump({"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}, text, indent=2)
    write(listing, save)
    print(listing)
