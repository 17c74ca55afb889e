"""The whole job on data that everybody has, in minutes on a CPU: it ends with one table and one picture.

    bash launch.sh demo                             # into runs/demo; what is finished is not done again
    bash launch.sh demo --seed 1 --out runs/demo1   # other first weights, order, views and labelled cases

MoCo v2 and the full method learn from the slices of a phantom, without labels. They and random weights are
then evaluated with the labels of a few cases: frozen under a linear decoder, and fine-tuned. Each step is a
script of the project, with the settings of experiments/configs/demo.yaml.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import eval_seg
import train_moco
from data import DataError
from engine.config import Config, OneLineParser, read_yaml, to_config
from engine.files import written_whole
from engine.ownership import claim, refuse_other_folder
from engine.stopping import STOPPED, StopRequest, run_script
from evaluation import metrics, report
from evaluation.results import percent, table
from experiments import figures, summary
from experiments.jobs import PROJECT, as_yaml
from prepare import commands
from weights import WeightsError

DEMO = "experiments.demo"  # whose folder this is, see engine/ownership.py
SETTINGS = PROJECT / "experiments" / "configs" / "demo.yaml"
NAMES = {"random": "random weights", "moco": "MoCo v2", "full": "full method"}
MODES = {"linear": "linear", "finetune": "fine-tuned"}
SECONDS = {"phantom": 15, "pretrain": 150, "linear": 25, "finetune": 60}  # about, on 2 cores


@dataclass
class Step:
    """A script of the demo; `result` is the last file that it writes."""

    title: str
    seconds: float
    main: Callable[[list[str]], int]
    words: list[str]
    result: Path


def steps_of(settings: Config, out: Path, seed: int) -> list[Step]:
    data = out / "data"
    words = ["phantom", "--out", str(data), *(f"--{name}={n}" for name, n in settings.phantom.items())]
    steps = [Step("data: a phantom", SECONDS["phantom"], commands.main, words, data / "test.txt")]
    for name, changes in settings.encoders.items():
        if changes is not None:
            folder = out / name
            words = as_words(settings.pretrain, changes, {"data.root": data, "run.out": folder, "seed": seed})
            title = f"pretraining: {NAMES[name]}"
            steps.append(Step(title, SECONDS["pretrain"], train_moco.main, words, folder / "encoder.json"))
    for mode in MODES:
        for name, changes in settings.encoders.items():
            folder = evaluation(out, name, mode)
            encoder = "random" if changes is None else out / name / "encoder.pth"
            own = {"mode": mode, "encoder": encoder, "model.arch": settings.pretrain.model.arch}
            own |= {"data.root": data, "run.out": folder, "seed": seed}
            title = f"{MODES[mode]}: {NAMES[name]}"
            words = as_words(settings[mode], own)
            steps.append(Step(title, SECONDS[mode], eval_seg.main, words, folder / "results.json"))
    return steps


def as_words(*settings: dict) -> list[str]:
    """As section.key=value; later ones win."""
    values = {}
    for one in settings:
        values |= to_config(one).flat()
    return [f"{name}={as_yaml(value)}" for name, value in values.items()]


def evaluation(out: Path, name: str, mode: str) -> Path:
    return out / f"{name}-{mode}"


# ---- Running it ----------------------------------------------------------------------------------


def run(steps: list[Step], stop: StopRequest) -> tuple[int, bool]:
    """All steps in order, in this process, so that bars are seen and signals stop the script under way. Those
    that are finished only look whether their settings are the same. Returns an exit code, 0 after all steps,
    and whether anything was done."""
    spent = planned = 0
    for number, step in enumerate(steps):
        there, began = step.result.is_file(), time.monotonic()
        if not there:
            left = sum(one.seconds for one in steps[number:] if not one.result.is_file())
            left *= spent / planned if planned else 1
            about = f"about {max(1, round(left / 60))} min left"
            print(f"\n== {number + 1}/{len(steps)} {step.title} ({about})", flush=True)
        with redirect_stdout(io.StringIO()) if there else nullcontext():
            code = step.main(step.words)
        if code or stop:
            print("stopped; the same command goes on")
            return code or STOPPED, True
        if not there:
            spent, planned = spent + time.monotonic() - began, planned + step.seconds
    return 0, spent > 0


def predict(out: Path, names: list[str], shown: list[str]) -> None:
    """What each linear decoder says of the slices in the picture: masks below out/shown."""
    for name in names:
        for slice in shown:
            words = [
                f"run.out={evaluation(out, name, 'linear')}",
                "--predict",
                str(out / "data/images" / slice),
            ]
            with redirect_stdout(io.StringIO()):
                eval_seg.main([*words, "--out", str((out / "shown" / name / slice).parent)])


# ---- What it ends with ---------------------------------------------------------------------------


def results_table(runs: dict[str, dict[str, dict]]) -> str:
    """A line for each encoder: Dice, and the gain over the first one with its p; below, the last over all
    others. runs: {mode: {encoder: results}}."""
    first, *others = next(iter(runs.values()))
    rows = [("test Dice in %", *(cell for mode in MODES.values() for cell in (mode, "gain", "p")))]
    for name in (first, *others):
        cells = []
        for own in runs.values():
            gain = ("", "") if name == first else gain_of(own[name], own[first])
            cells += [percent(own[name]["mean_dice"]), *gain]
        rows.append((NAMES[name], *cells))
    lines = [table(rows), ""]
    cases = next(iter(runs["linear"].values()))["cases"]
    lines.append(f"gain: points over {NAMES[first]}; p: sign-flip test over the {len(cases)} test cases")
    if len(others) > 1:
        *_, rival, best = others
        found = {mode: gain_of(own[best], own[rival]) for mode, own in runs.items()}
        text = ", ".join(f"{MODES[mode]} {gain} (p = {p})" for mode, (gain, p) in found.items())
        lines.append(f"{NAMES[best]} over {NAMES[rival]}: {text}")
    for name, own in runs["finetune"].items():
        if missed := [organ for organ, dice in own["dice"].items() if dice is not None and dice < 0.005]:
            lines.append(f"not found after fine-tuning, {NAMES[name]}: {', '.join(missed)}")
    return "\n".join(lines)


def gain_of(run: dict, base: dict) -> tuple[str, str]:
    """Mean gain in points, and p."""
    gains = report.gains([run], [base])
    return (f"{100 * mean(gains):+.1f}", f"{metrics.sign_flip_test(gains):.1g}") if gains else ("-", "-")


NEXT = """\
Your own CTs (folders of NIfTI, DICOM, NRRD or MetaImage; pip install nibabel SimpleITK), see README.md:
    {python} data.py slice --images cts --labels labels --out data/mine
    {python} train_moco.py data.root=data/mine run.out=runs/mine
    {python} eval_seg.py data.root=data/mine encoder=runs/mine/encoder.pth run.out=runs/mine-linear"""


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default=str(SETTINGS), metavar="FILE")
    args = parser.parse_args(argv)
    settings, out, began = to_config(read_yaml(args.settings)), Path(args.out), time.monotonic()
    refuse_other_folder(out, DEMO)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, DEMO)
    with StopRequest() as stop:
        code, worked = run(steps_of(settings, out, args.seed), stop)
    if code:
        return code

    encoders = list(settings.encoders)
    folders = {mode: {name: evaluation(out, name, mode) for name in encoders} for mode in MODES}
    runs = {
        mode: {name: report.read_results(one) for name, one in own.items()} for mode, own in folders.items()
    }
    picture = out / "summary.png"
    if worked or not picture.is_file():
        shown = figures.shown_slices(out / "data")
        predict(out, encoders, shown)
        with written_whole(picture) as file:
            summary.page(out, runs, NAMES, shown).save(file, format="PNG", optimize=True)
    print(f"\n{results_table(runs)}\n\npicture: {picture}")
    if worked:
        print(f"all of it took {(time.monotonic() - began) / 60:.1f} minutes")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"\n{NEXT.format(python=python)}")
    return 0


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError, *train_moco.FAILURES))
