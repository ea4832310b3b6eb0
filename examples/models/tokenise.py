#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns the prompts that `rflow_study kvpr` and `rflow_study mdqa` write into a prompt file for `rflow_study probe`.

    pip install transformers safetensors numpy
    python tokenise.py MODEL prompts.jsonl prompts.safetensors --task kvpr

MODEL is a folder with a tokenizer, or a name that transformers can load one by. No special token is added
unless the tokenizer does so by itself.
"""
import argparse
import json

import numpy as np
from safetensors.numpy import save_file
from transformers import AutoTokenizer

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model")
arguments.add_argument("prompts")
arguments.add_argument("output")
arguments.add_argument("--task", default="", help="shown in reports")
options = arguments.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
ids, offsets, gold, group = [], [0], [], []
with open(options.prompts, encoding="utf-8") as lines:
    for line in lines:
        prompt = json.loads(line)
        ids += tokenizer(prompt["prompt"])["input_ids"]
        offsets.append(len(ids))
        gold.append(prompt["label"])
        group.append(prompt["context"])
save_file({name: np.array(values, dtype=np.int64)
           for name, values in {"ids": ids, "offsets": offsets, "gold": gold, "group": group}.items()},
          options.output, metadata={"task": options.task} if options.task else None)
print(f"{len(gold)} prompts of {len(ids) / len(gold):.0f} tokens on average")
