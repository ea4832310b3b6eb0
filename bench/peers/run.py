# SPDX-License-Identifier: Apache-2.0
"""Runs rflow and its peers on the same saved activations and prints what each took and how far it was off.

Every peer is a process of its own with its own time limit. All of a cell's processes are started first and
then asked in turns, so that they see the same machine; the median counts. See README.md."""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import re
import select
import subprocess
import sys
import time
from importlib import metadata

import cases

HERE = pathlib.Path(__file__).parent
OURS = "rflow"
REST = 0.25  # seconds before each question: threads of the peer before may spin for a while

# task: title, and the peers besides rflow
TASKS = {
    "cka debiased": (
        "CKA of all pairs of sites, debiased",
        ["torch_cka", "ckatorch", "repsim", "numpy, each pair", "pytorch-cka", "numpy, each Gram once"],
    ),
    "cka biased": (
        "CKA of all pairs of sites, biased",
        ["ckatorch", "repsim", "numpy, each pair", "numpy, each Gram once"],
    ),
    "inter-token": (
        "Inter-token cosine of every site",
        ["PyTorch", "SimSIMD", "NumKong", "PyTorch, sum of unit rows"],
    ),
    "adjacent": ("Adjacent cosine of every pair of neighbours", ["PyTorch", "SimSIMD", "NumKong"]),
    "probe": (
        f"Softmax probes of the middle site: {cases.CLASSES} classes, {cases.SEEDS} probes of {cases.EPOCHS} epochs",
        ["PyTorch, Linear and Adam", "scikit-learn, L-BFGS"],
    ),
}

# Work for so many sites, for the peers that work pair by pair: where all sites would take too long, some
# do, and the time for all is this ratio.
WORK = {
    "torch_cka": lambda sites: sites * sites + sites / 2,
    "ckatorch": lambda sites: sites * sites,
    "repsim": lambda sites: sites * (sites + 1) / 2 + sites,
    "numpy, each pair": lambda sites: sites * sites,
}


class Worker:
    """A peer that has the input in its memory and waits."""

    def __init__(self, peer, command, threads, limit):
        self.peer, self.limit = peer, limit
        names = ["OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR"]
        environment = os.environ | {f"{name}_NUM_THREADS": str(threads) for name in names}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def ask(self, text):
        """The answer, or {"failed": …} where none comes in time or the process died."""
        try:
            self.process.stdin.write(text.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self.end()}
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        if not ready:
            self.process.kill()
            self.end()
            return {"failed": f"over {self.limit:g} s", "late": True}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": self.end()}

    def end(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        code = self.process.wait()
        self.process.stdout.close()
        return "killed (memory?)" if code == -9 else f"died with status {code}"


class Cell:
    """One peer at one task of one file: when it is asked, and what came of it."""

    def __init__(self, peer, worker, task, sites, options):
        self.peer, self.worker, self.task, self.all, self.options = peer, worker, task, sites, options
        self.chosen = [0, sites - 1] if peer in WORK else list(range(sites))
        self.seconds, self.bytes, self.values, self.failed = [], 0, None, None

    def ask(self):
        time.sleep(REST)
        text = self.task if self.peer == OURS else json.dumps({"task": self.task, "sites": self.chosen})
        reply = self.worker.ask(text)
        if "failed" in reply:
            if reply.get("late") and len(self.chosen) < self.all:
                reply["failed"] += f" for {len(self.chosen)} sites"
            self.failed = reply["failed"]
            return None
        self.bytes = max(self.bytes, reply["bytes"])
        self.values = reply["values"]
        return reply["seconds"]

    def warm_up(self):
        """The first answer; it counts only where more would take too long. Pair by pair, it is for two
        sites and tells how many fit into the time for one answer."""
        first = self.ask()
        if first is not None and self.peer in WORK:
            work = WORK[self.peer]
            fit = 2
            while fit < self.all and first * work(fit + 1) / work(2) <= self.options.budget:
                fit += 1
            if fit > 2:
                self.chosen = sorted({round(i * (self.all - 1) / (fit - 1)) for i in range(fit)})
                first = self.ask()
        if first is None:
            return
        self.rounds = min(self.options.rounds, int(self.options.budget / max(first, 1e-9)))
        if self.rounds < 2:
            self.seconds, self.rounds = [first], 0

    def result(self, reference):
        out = {"peer": self.peer}
        if self.failed:
            return out | {"failed": self.failed}
        median = sorted(self.seconds)[len(self.seconds) // 2]
        out |= {"seconds": median, "all_seconds": [round(s, 7) for s in self.seconds], "bytes": self.bytes}
        if len(self.chosen) < self.all:
            factor = WORK[self.peer](self.all) / WORK[self.peer](len(self.chosen))
            out |= {"sites_run": len(self.chosen), "seconds": median * factor}
            reference = reference[self.chosen][:, self.chosen]
        errors = [abs(a - b) for a, b in zip(flat(self.values), flat(reference.tolist()), strict=True)]
        nan = sum(math.isnan(e) for e in errors)
        out |= {"cells": len(errors), "nan": nan, "error": max((e for e in errors if not math.isnan(e)), default=None)}
        if self.task == "probe":
            out["loss"] = self.values[0]
        return out


def flat(values):
    if isinstance(values, list):
        return [x for v in values for x in flat(v)]
    return [math.nan if values is None else values]  # JSON of ours has null for NaN


def cores():
    return len(os.sched_getaffinity(0))


def ours(path, options):
    numbers = [options.threads, cases.EPOCHS, cases.SEEDS, cases.LEARNING_RATE, cases.SHORT]
    return [options.program, path, *map(str, numbers)]


def run_file(path, case, kind, tasks, options):
    """All tasks of one file."""
    sites, tokens, width = cases.CASES[case]
    references = cases.references(path, tasks)
    out = []
    for task in tasks:
        say(f"{case} {kind} {task}")
        cells = []
        for peer in [OURS] + TASKS[task][1]:
            if peer == OURS:
                command = ours(path, options)
            else:
                command = [options.python, HERE / "peers.py", peer, path, str(options.threads or cores())]
            worker = Worker(peer, command, options.threads or cores(), options.limit)
            cells.append(Cell(peer, worker, task, sites, options))
        for cell in cells:
            cell.warm_up()
            say(f"  {cell.peer}: {cell.failed or 'ready'}")
        for turn in range(options.rounds):
            for cell in cells:
                if not cell.failed and turn < cell.rounds:
                    seconds = cell.ask()
                    if seconds is not None:
                        cell.seconds.append(seconds)
        for cell in cells:
            cell.worker.end()
        results = [cell.result(references[task]) for cell in cells]
        out.append({"case": case, "type": kind, "shape": [sites, tokens, width], "task": task, "results": results})
    return out


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- the table -------------------------------------------------------------------------------------


def duration(seconds):
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"


def size(count):
    return f"{count / 2**20:.2g} MiB" if count < 100 * 2**20 else f"{count / 2**20:.0f} MiB"


def cell_text(result, ours):
    if "failed" in result:
        return result["failed"]
    text = ("≈ " if "sites_run" in result else "") + duration(result["seconds"])
    if result["peer"] != OURS and "seconds" in ours:
        text += f" ({result['seconds'] / ours['seconds']:.3g} ×)"
    text += f"; {size(result['bytes'])}; "
    if result["nan"]:
        text += f"NaN in {result['nan']} of {result['cells']}; "
    if result["peer"].startswith("scikit-learn"):
        return text + f"loss {result['loss']:.2g}"
    return text + (f"{result['error']:.0e}" if result["error"] is not None else "").replace("e-0", "e-")


def table(record):
    lines = []
    for task, (title, peers) in TASKS.items():
        rows = [row for row in record["rows"] if row["task"] == task]
        if not rows:
            continue
        lines += [f"### {title}", "", "| sites × tokens × width | type | " + " | ".join([OURS] + peers) + " |"]
        lines.append("|" + "---|" * (len(peers) + 3))
        for row in rows:
            ours = row["results"][0]
            texts = [cell_text(result, ours) for result in row["results"]]
            shape = " × ".join(map(str, row["shape"]))
            lines.append(f"| {shape} | {row['type']} | " + " | ".join(texts) + " |")
        lines.append("")
    lines.append(caption(record))
    return "\n".join(lines) + "\n"


def caption(record):
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        "In a cell: time (× rflow's); peak memory beyond the input; largest absolute error against float64. "
        f"≈: run on fewer sites and scaled by the number of pairs. Median of at most {record['rounds']} answers in "
        f"turns after a first; one answer where it takes more than {record['budget'] / 2:g} s; given up after "
        f"{record['limit']:g} s. What takes less than {cases.SHORT:g} s is repeated for so long, and the median is the answer.\n\n"
        f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; {m['system']}; {record['threads']} threads "
        f"each (repsim, and adjacent cosines by SimSIMD and NumKong: 1; rflow: at most, as it sees fit). rflow: {record['build']['compiler']}, "
        f"`{record['build']['flags']}`. Python {record['python']}: {versions}. Floor in the same run: "
        f"{record['floor'][0] / 1e9:.0f} Gflop/s of fp32 multiply-adds, {record['floor'][1] / 1e9:.1f} GB/s read. "
        f"{record['date']}."
    )


# ---- the machine -----------------------------------------------------------------------------------


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    memory = int(re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1])
    family, model = (re.search(rf"^{key}\s*:\s*(\d+)", info, re.M) for key in ("cpu family", "model"))
    name = re.search(r"model name\s*:\s*(.*)", info)[1]
    if family and model:
        name += f" (family {family[1]}, model {model[1]})"
    return {
        "processor": name,
        "cores": cores(),
        "memory_gib": round(memory / 2**20),
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
    }


def versions():
    named = re.findall(r"^([\w.-]+)==", (HERE / "requirements.txt").read_text(), re.M)
    return {name: metadata.version(name) for name in named}


def floor(path, options):
    worker = Worker(OURS, ours(path, options), options.threads or cores(), options.limit)
    values = worker.ask("floor")["values"]
    worker.end()
    return values


def main():
    listed = lambda names: lambda text: [pick(name, names) for name in text.split(",")]

    def pick(name, names):
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(names)}")
        return name

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=pathlib.Path, default=HERE / "../../build/bench/bench/rflow_bench_peers")
    parser.add_argument("--work", type=pathlib.Path, default=HERE / "../../build/peers", help="for inputs, references")
    parser.add_argument("--results", type=pathlib.Path, help="default: results/<machine>.json beside this file")
    parser.add_argument("--cases", type=listed(cases.CASES), default=list(cases.CASES), help=",".join(cases.CASES))
    parser.add_argument("--types", type=listed(["fp32", "bf16"]), default=["fp32", "bf16"], help="fp32,bf16")
    parser.add_argument("--tasks", type=listed(TASKS), default=list(TASKS), help=",".join(TASKS))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores, for rflow at most")
    parser.add_argument("--rounds", type=int, default=5, help="answers that the median is of")
    parser.add_argument("--budget", type=float, default=6, help="seconds for all answers of one cell, about")
    parser.add_argument("--limit", type=float, default=40, help="seconds for one answer, at most")
    parser.add_argument("--table", type=pathlib.Path, help="print the table of these results, and run nothing")
    options = parser.parse_args()
    options.python = sys.executable
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    if not options.program.exists():
        parser.error(f"{options.program} is missing: cmake --workflow --preset bench builds it")

    options.work.mkdir(parents=True, exist_ok=True)
    files = [(case, kind) for case in options.cases for kind in options.types]
    paths = {key: cases.make(*key, options.work) for key in files}
    say("inputs are there")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads or cores(),
        "rounds": options.rounds,
        "budget": options.budget,
        "limit": options.limit,
        "build": json.loads(subprocess.check_output([options.program, "--build"])),
        "python": platform.python_version(),
        "versions": versions(),
        "floor": floor(paths[files[0]], options),
        "rows": [],
    }
    results = options.results
    if results is None:
        slug = re.sub(r"[^a-z0-9]+", "-", record["machine"]["processor"].lower()).strip("-")
        results = HERE / "results" / f"{slug}-{record['machine']['cores']}-cores.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    for case, kind in files:
        record["rows"] += run_file(paths[case, kind], case, kind, options.tasks, options)
        results.write_text(json.dumps(record, indent=1) + "\n")  # after each file: a long run may be stopped
    say(f"written to {results}")
    print(table(record), end="")


if __name__ == "__main__":
    main()
