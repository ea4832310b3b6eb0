#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The trained contrast: the two small models of examples/models/trained beside random weights of the same
# architectures, on key-value retrieval at four context lengths. A minute or two on two cores.
#
#     examples/study/trained.sh PROGRAM OUT_DIR
#
# OUT_DIR/probe-* have probes and flow by layer for each context length, OUT_DIR/gpt-neox and OUT_DIR/mamba the full
# reports; the figures of all are gathered in OUT_DIR/figures.csv and printed.
set -euo pipefail
program=$1 out=$2
trained=$(cd "$(dirname "$0")/../models/trained" && pwd)
mkdir -p "$out"
prompts=()
for pairs in 4 8 12 16; do
  prompts+=("$out/pairs-$pairs.safetensors")
  [ -e "${prompts[-1]}" ] ||
    "$program" kvpr "${prompts[-1]}" --integers --keys 16 --values 16 --pairs "$pairs" --contexts $((1600 / pairs)) --seed 1
done
# 64 tokens as in training: 16 pairs, then every key with its value.
python3 - "$out/ids.npy" <<'PYTHON'
import array, random, sys
draw = random.Random(1)
keys = draw.sample(range(1, 17), 16)
pairs = {key: draw.randrange(17, 33) for key in keys}
asked = draw.sample(keys, 16)
ids = array.array("q", [t for key in keys + asked for t in (key, pairs[key])])
head = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({len(ids)},), }}"
head += " " * (-(len(head) + 11) % 64) + "\n"
with open(sys.argv[1], "wb") as file:
    file.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + ids.tobytes())
PYTHON
for label in answer gold; do  # what is asked for, and where it stood
  "$program" probe "$trained/gpt-neox" "$trained/mamba" -p "${prompts[@]}" --label $label --against-random transformers \
    -o "$out/probe-$label" --force
done
for model in gpt-neox mamba; do
  "$program" checkpoint "$trained/$model" --ids "$out/ids.npy" --against-random transformers -o "$out/$model" --force
done
python3 - "$out" <<'PYTHON'
import csv, json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = []
mean = lambda x: x["mean"] if x else None
for r in sum((json.loads((out / f"probe-{label}/study.json").read_text())["runs"] for label in ("answer", "gold")), []):
    rows.append({"model": r["model"], "task": r["task"], "prompts": r["prompts"], "chance": r["chance"],
                 "best_site": r["best_site"], "best": mean(r["best"]), "last": mean(r["last"]), "drop": r["drop"],
                 "final_norm": mean(r["final_norm"]), **{f"accuracy_{l}": mean(x) for l, x in enumerate(r["accuracy"])}, "st1": mean(r["st1"]), "st2": mean(r["st2"]),
                 **{f"inter_token_{l}": mean(x) for l, x in enumerate(r["inter_token"])},
                 **{f"adjacent_{l}": mean(x) for l, x in enumerate(r["adjacent_cosine"])}})
names = list(dict.fromkeys(name for r in rows for name in r))
with open(out / "figures.csv", "w", newline="") as file:
    table = csv.DictWriter(file, names)
    table.writeheader()
    table.writerows(rows)
for r in rows:
    print(*(f"{v:.3g}" if isinstance(v, float) else v for v in r.values()), sep="\t")
PYTHON
