#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The random-initialisation study of the five models at full size: some 20 minutes a seed on two cores.
#
#     examples/study/full_size.sh PROGRAM OUT_DIR [SEEDS]
#
# One run of the program per model, so that what is done is kept; the figures of all are gathered in
# OUT_DIR/figures.csv and printed. A model whose folder is there already is not run again.
set -euo pipefail
program=$1 out=$2 seeds=${3:-1}
mkdir -p "$out"
for model in mamba2-130m pythia-2.8b gpt-neo-2.7b mamba-2.8b mamba2-2.7b; do
  [ -e "$out/$model/study.json" ] ||
    "$program" random -m "$model" -s gaussian -s xavier -s kaiming --seeds "$seeds" -n 2048 -o "$out/$model"
done
python3 - "$out" <<'PYTHON'
import csv, json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = []
for path in sorted(out.glob("*/study.json")):
    study = json.loads(path.read_text())
    for r in study["runs"]:
        c, blocks = r["inter_token"], r["blocks"]
        at = {f"inter_token_{f}": c[round(f * blocks)] for f in (0, 0.1, 0.25, 0.5, 0.75, 1)}
        rows.append({"model": r["model"], "scheme": r["scheme"], "control": r["control"], "seed": r["seed"], **at,
                     "final_norm": r["inter_token_final_norm"], "st1": r["st1"], "st2": r["st2"],
                     "seconds": round(r["seconds"], 1), "share_of_peak": round(r["share_of_peak"], 3),
                     "drawing": round(r["seconds_for_weights"] / r["seconds"], 3),
                     "memory_gib": round(study["machine"]["memory_gib"], 2)})
with open(out / "figures.csv", "w", newline="") as file:
    table = csv.DictWriter(file, rows[0])
    table.writeheader()
    table.writerows(rows)
for r in rows:
    print(*(f"{v:.3g}" if isinstance(v, float) else v for v in r.values()), sep="\t")
PYTHON
