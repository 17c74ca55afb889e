"""The whole job on data that everybody has, in minutes on a CPU: it ends with one table and one picture.

    bash launch.sh demo                             # into runs/demo; what is finished is not done again
    bash launch.sh demo --seed 1 --out runs/demo1   # other first weights, order, views and labelled cases

MoCo v2 and the full method learn from the slices of a phantom, without labels. They and random weights are
then evaluated with the labels of a few cases: frozen under a linear decoder, and fine-tuned. Each step is a
script of the project, with the settings of experiments/configs/demo.yaml. Two encoders are worked on at a
time, since the cores then have more to do.
"""

import argparse
import io
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tqdm import tqdm

import eval_seg
import train_moco
from data import DataError
from engine.config import Config, OneLineParser, read_yaml, to_config
from engine.files import written_whole
from engine.ownership import claim, refuse_other_folder
from engine.stopping import STOPPED, run_script
from evaluation import metrics, report
from evaluation.results import percent, table
from experiments import figures, summary
from experiments.jobs import PROJECT, Jobs, Stopped, as_yaml
from prepare import commands
from weights import WeightsError

DEMO = "experiments.demo"  # whose folder this is, see engine/ownership.py
SETTINGS = PROJECT / "experiments" / "configs" / "demo.yaml"
NAMES = {"random": "random weights", "moco": "MoCo v2", "full": "full method"}
MODES = {"linear": "linear", "finetune": "fine-tuned"}
SECONDS = {"phantom": 15, "pretrain": 300, "linear": 45, "finetune": 90}  # about, on one core
SCRIPTS = {"data.py": commands.main, "train_moco.py": train_moco.main, "eval_seg.py": eval_seg.main}
DATA = "data"


@dataclass
class Step:
    """A script of the demo; `result` is the last file that it writes, `log` what it says."""

    title: str
    seconds: float
    script: str
    words: list[str]
    result: Path
    log: Path

    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        if self.result.is_file():
            return 1.0
        found = re.findall(r"step (\d+)/(\d+) ", self.log.read_text()) if self.log.is_file() else []
        return int(found[-1][0]) / int(found[-1][1]) if found else 0.0


def steps_of(settings: Config, out: Path, seed: int) -> dict[str, list[Step]]:
    """Those of the data, and those of each encoder, in order."""
    root, logs = out / DATA, out / "logs"
    words = ["phantom", "--out", str(root), *(f"--{name}={n}" for name, n in settings.phantom.items())]
    data = Step("a phantom", SECONDS["phantom"], "data.py", words, root / "test.txt", logs / "data.log")
    steps = {DATA: [data]}
    for name, changes in settings.encoders.items():
        own, encoder = [], "random"
        if changes is not None:
            folder, encoder = out / name, out / name / "encoder.pth"
            words = as_words(settings.pretrain, changes, {"data.root": root, "run.out": folder, "seed": seed})
            what = (f"{NAMES[name]}, pretraining", SECONDS["pretrain"], "train_moco.py")
            own.append(Step(*what, words, folder / "encoder.json", logs / f"{name}.log"))
        for mode in MODES:
            folder = evaluation(out, name, mode)
            common = {"mode": mode, "encoder": encoder, "model.arch": settings.pretrain.model.arch}
            common |= {"data.root": root, "run.out": folder, "seed": seed}
            what = (f"{NAMES[name]}, {MODES[mode]}", SECONDS[mode], "eval_seg.py")
            words = as_words(settings[mode], common)
            own.append(Step(*what, words, folder / "results.json", logs / f"{folder.name}.log"))
        steps[name] = own
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


class Demo(Jobs):
    """The steps, as processes. What is finished is only asked whether its settings are the same."""

    def __init__(self, steps: dict[str, list[Step]], jobs: int):
        super().__init__(jobs)
        self.steps = steps
        self.todo = [step for own in steps.values() for step in own if not step.result.is_file()]
        self.current = []  # titles
        self.began, self.before = time.monotonic(), self.done()

    def done(self) -> float:
        """Of what is to do, in seconds as they were planned."""
        return sum(step.seconds * step.share() for step in self.todo)

    def run(self) -> None:
        for step in sum(self.steps.values(), []):
            if step not in self.todo:
                with redirect_stdout(io.StringIO()):
                    SCRIPTS[step.script](step.words)
        if not self.todo:
            return
        planned = sum(step.seconds for step in self.todo)
        form = "{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}"
        how = {"smoothing": 0, "dynamic_ncols": True, "leave": False, "disable": not sys.stderr.isatty()}
        bar = tqdm(total=planned, initial=self.before, bar_format=form, **how)
        with ThreadPoolExecutor(1) as pool, bar:
            work = pool.submit(self.work)
            while not work.done():
                self.show(bar)
                time.sleep(0.2)
            work.result()

    def work(self) -> None:
        data, *encoders = self.steps.values()
        self.in_turn(data)
        self.all(self.in_turn, encoders[::-1])  # the longest first

    def in_turn(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if step in self.todo:
                self.current.append(step.title)
                self.call(step.log, step.script, *step.words)
                self.current.remove(step.title)
                tqdm.write(done_text(step))

    def show(self, bar: tqdm) -> None:
        """Where it is: the bar, or a line for each tenth where there is no terminal."""
        before, bar.n, now = bar.n, self.done(), "; ".join(self.current)
        bar.set_postfix_str(now)
        if bar.disable and bar.n > self.before and 10 * bar.n // bar.total > 10 * before // bar.total:
            gone = time.monotonic() - self.began
            left = gone * (bar.total - bar.n) / (bar.n - self.before)
            gone, left = map(tqdm.format_interval, (gone, left))
            print(f"{100 * bar.n / bar.total:.0f} % ({gone} gone, {left} left): {now}", flush=True)


def done_text(step: Step) -> str:
    if step.script != "eval_seg.py":
        return f"{step.title}: done"
    return f"{step.title}: test Dice {percent(report.read_results(step.result.parent)['mean_dice'])} %"


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
    settings, out = to_config(read_yaml(args.settings)), Path(args.out)
    refuse_other_folder(out, DEMO)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, DEMO)
    demo = Demo(steps_of(settings, out, args.seed), jobs=min(2, os.cpu_count() or 1))
    demo.stop_on_signals()
    try:
        demo.run()
    except Stopped:
        print("stopped; the same command goes on")
        return STOPPED

    encoders = list(settings.encoders)
    folders = {mode: {name: evaluation(out, name, mode) for name in encoders} for mode in MODES}
    runs = {
        mode: {name: report.read_results(one) for name, one in own.items()} for mode, own in folders.items()
    }
    picture = out / "summary.png"
    if demo.todo or not picture.is_file():
        shown = figures.shown_slices(out / "data")
        predict(out, encoders, shown)
        with written_whole(picture) as file:
            summary.page(out, runs, NAMES, shown).save(file, format="PNG", optimize=True)
    print(f"\n{results_table(runs)}\n\npicture: {picture}")
    if demo.todo:
        print(f"all of it took {(time.monotonic() - demo.began) / 60:.1f} minutes")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"\n{NEXT.format(python=python)}")
    return 0


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError, *train_moco.FAILURES))
