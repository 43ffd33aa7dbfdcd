"""Run a few trials of a W&B sweep on this machine: no account, no network; a table of the trials and a picture.

    python recipes/sweep_offline.py recipes/sweeps/compress.yaml                 # compresses one finished run
    python recipes/sweep_offline.py recipes/sweeps/train.yaml --trials 3         # trains every trial
    python recipes/sweep_offline.py recipes/sweeps/compress.yaml --compress.tolerance 0.01     # for every trial

Each trial is started as `wandb agent` starts it, by its own code, and leaves an offline run that `wandb sync` uploads.
Only the choice differs: W&B's server searches with Bayes and stops trials early, here values are drawn at random from
the distributions of the file, and every trial runs to its end.
"""

import argparse
import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import dtrain
from dtrain.callbacks.weights_and_biases import check_installed
from dtrain.progress import progress
from parts.offline_runs import summary
from parts.presets import read_config
from parts.recipe import run

FOLDER = Path("runs/sweeps")
DISTRIBUTIONS = {
    "uniform": random.Random.uniform,
    "int_uniform": random.Random.randint,
    "log_uniform_values": lambda rng, low, high: math.exp(rng.uniform(math.log(low), math.log(high))),
}


@dataclass(frozen=True)
class Trial:
    """What a trial was given and what it has logged."""

    name: str
    values: Mapping[str, Any]
    logged: Mapping[str, Any]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", type=Path, help="a sweep file of W&B")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    given, rest = parser.parse_known_args()
    if given.trials < 1:
        raise dtrain.InputError(f"--trials is {given.trials}, expected 1 or more.")
    check_installed()
    sweep, folder = read_sweep(given.sweep), FOLDER / given.sweep.stem
    rng = random.Random(given.seed)  # noqa: S311 - no secret is drawn
    draws = [draw(sweep["parameters"], rng) for _ in range(given.trials)]
    trials: list[Trial] = []
    with progress(f"trials of {given.sweep}", len(draws)) as advance:
        for number, values in enumerate(draws):
            trials.append(run_trial(sweep, values, f"{given.sweep.stem}-{given.seed}-{number}", folder, rest))
            advance(f"objective {trials[-1].logged[sweep['metric']['name']]:.3f}")
    trials.sort(key=lambda trial: trial.logged[sweep["metric"]["name"]])
    console = Console()
    console.width = max(console.width, 100)
    console.print(trial_table(trials, f"{given.sweep}: {len(trials)} trials, the best first"))
    path = folder / "score_against_bytes.png"
    draw_trials(trials, path, f"{given.sweep.name}: {len(trials)} trials")
    sys.stdout.write(f"picture: {path}\nruns: {folder / 'wandb'}; `wandb sync` uploads them\n")


def read_sweep(path: Path) -> dict[str, Any]:
    """Return what a sweep file says.

    Raises:
        InputError: If it lacks what every sweep has.
    """
    if not path.is_file():
        raise dtrain.InputError(f"there is no sweep file {path}. Give recipes/sweeps/compress.yaml or train.yaml.")
    sweep = read_config(path)
    if missing := [key for key in ("program", "metric", "parameters", "command") if key not in sweep]:
        raise dtrain.InputError(f"{path} has no {', '.join(missing)}; it has {', '.join(sweep) or 'nothing'}.")
    return sweep


def draw(parameters: Mapping[str, Mapping[str, Any]], rng: random.Random) -> dict[str, Any]:
    """Return a value for every parameter, by its distribution.

    Raises:
        InputError: If a distribution is not known here.
    """
    drawn: dict[str, Any] = {}
    for name, spec in parameters.items():
        kind = spec.get("distribution", "uniform")
        if "value" in spec:
            drawn[name] = spec["value"]
        elif "values" in spec:
            drawn[name] = rng.choice(spec["values"])
        elif kind in DISTRIBUTIONS:
            drawn[name] = DISTRIBUTIONS[kind](rng, spec["min"], spec["max"])
        else:
            known = ", ".join(DISTRIBUTIONS)
            raise dtrain.InputError(f"{name}: no draws from {kind!r} here. Give values, or one of {known}.")
    return drawn


def run_trial(
    sweep: Mapping[str, Any], values: Mapping[str, Any], name: str, folder: Path, rest: Sequence[str]
) -> Trial:
    """Run one trial by the agent's own code, and read back what it has logged.

    Raises:
        InputError: If it fails; its output is kept.
    """
    from wandb.wandb_agent import Agent

    begun, name = time.monotonic(), f"{name}-{int(time.time())}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "offline", "WANDB_SWEEP_ID": folder.name}
    os.environ |= {"WANDB_DIR": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    agent = Agent(None, None, sweep_id=folder.name)  # neither of both is asked before there is a server
    fixed = [f"--trainer.logger.save_dir={folder}", *rest]
    agent._sweep_command = [part for word in sweep["command"] for part in (*fixed * (word == "${args}"), word)]
    arguments = {key: {"value": value} for key, value in values.items()}
    log = folder / f"{name}.log"
    with output_to(log):
        agent._command_run({"type": "run", "run_id": name, "program": sweep["program"], "args": arguments})
    (process,) = agent._run_processes.values()
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # it has a process group of its own, which Ctrl-C does not reach
        raise
    found = list((folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    if code or not found:
        last = log.read_text().strip().splitlines()[-1:]
        raise dtrain.InputError(f"a trial ended with exit code {code}: {' '.join(last)}. Its output: {log}.")
    logged = summary(found[0])
    if sweep["metric"]["name"] not in logged:
        raise dtrain.InputError(f"a trial has logged {', '.join(sorted(logged))}, but not {sweep['metric']['name']}.")
    return Trial(name, values, logged, time.monotonic() - begun)


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """A context in which processes are started that write to a file: the agent lets them have our own output."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        with log.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def trial_table(trials: Sequence[Trial], title: str) -> Table:
    """Return one row per trial: what it was given, and what came of it."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    varied = [name.rsplit(".", 1)[-1] for name in trials[0].values]
    for name in [*varied, "bytes", "ratio", "score", "drop", "feasible", "objective", "seconds"]:
        table.add_column(name, justify="right", no_wrap=True)
    for trial in trials:
        given = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.values.values())
        size, ratio, score, drop, feasible, objective = (
            trial.logged[f"dtrain/{name}"]
            for name in ("bytes", "ratio", "metric_compressed", "metric_drop", "feasible", "objective")
        )
        what = (f"{size:,}", f"{ratio:,.1f}", f"{score:.4f}", f"{drop:.4f}", "yes" if feasible else "no")
        table.add_row(*given, *what, f"{objective:.3f}", f"{trial.seconds:.0f}")
    best = next((trial for trial in trials if trial.logged["dtrain/feasible"]), None)
    table.caption = f"smallest within the tolerance: {best.name}" if best else "no trial is within the tolerance"
    return table


def draw_trials(trials: Sequence[Trial], path: Path, title: str) -> None:
    """Draw score against bytes, a point per trial: filled within the tolerance, hollow beyond it."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    methods = sorted({str(trial.values.get("method", "")) for trial in trials})
    for trial in trials:
        which = methods.index(str(trial.values.get("method", "")))
        face = f"C{which}" if trial.logged["dtrain/feasible"] else "none"
        where = trial.logged["dtrain/bytes"], trial.logged["dtrain/metric_compressed"]
        axes.scatter(*where, marker="osD^v"[which % 5], facecolor=face, edgecolor=f"C{which}")
    for which, method in enumerate(methods):
        axes.scatter([], [], marker="osD^v"[which % 5], color=f"C{which}", label=method)
    tuned = max(trial.logged["dtrain/metric_finetuned"] for trial in trials)
    axes.axhline(tuned, color="0.45", linewidth=1.2)
    axes.annotate(f"fine-tuned {tuned:.3f}", (0.01, tuned), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set(xscale="log", xlabel="bytes of the delta file", ylabel="score on validation", title=title)
    axes.margins(y=0.1)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
