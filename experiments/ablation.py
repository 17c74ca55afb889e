"""Does each part of the method do what it claims? Pretrain, evaluate and compare them under one protocol.

    bash launch.sh ablation                          # all of experiments/configs/ablation.yaml; resumable
    bash launch.sh ablation --only moco full --seeds 0
    bash launch.sh ablation --out runs/other phantom.seed=7        # the same on other patients
    bash launch.sh ablation --table                  # only the tables of what is finished

The protocol, with every setting, is the config file. In OUT: protocol.yaml; cells.jsonl, which tables and
figures are made of (see cells.py); and work/, which may be deleted when nothing runs. What is in cells.jsonl
is not run again.
"""

import argparse
import base64
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import yaml

from engine.config import ConfigError, OneLineParser, from_yaml, read_yaml, to_config
from engine.files import write_whole
from engine.ownership import claim, refuse_foreign, refuse_other_folder
from engine.process import start_process
from engine.stopping import STOPPED, run_script
from evaluation.results import has_metrics, percent, read_results
from experiments import figures, findings
from experiments.cells import (
    Cell,
    Cells,
    benchmark_record,
    best_rate,
    evaluation_name,
    evaluation_record,
    pretraining_record,
)
from experiments.jobs import PROJECT, Jobs, Stopped, without_machine

ABLATION = "experiments.ablation"  # whose folders these are, see engine/ownership.py
PROTOCOL = PROJECT / "experiments" / "configs" / "ablation.yaml"


class Ablation(Jobs):
    """The protocol, the folder, and what is run of them."""

    def __init__(self, protocol: dict, out: Path, jobs: int):
        super().__init__(jobs)
        self.protocol, self.out = protocol, out
        self.cells = Cells(out)
        self.root = Path(protocol["data"]["root"]) if "data" in protocol else out / "work" / "data"
        self.methods = protocol["methods"] | protocol["variants"]

    def run(self, methods: list[str], seeds: list[int]) -> None:
        """All cells of these methods: those that decide about learning rates, then seed by seed, so that what
        is there can be compared at any time, and the variants last. A cell is measured in one go: encoders
        are too large to be kept with the results."""
        self.make_data()
        main = [name for name in methods if name in self.protocol["methods"]]
        if not self.protocol["in_depth"]:
            return self.all(lambda method: self.whole(method, seeds), main)
        first = self.protocol["seeds"][0]
        trained = [name for name in main if self.methods[name] is not None]
        tuning = [Cell(name, rate, first) for rate in self.protocol["rates"] for name in trained]
        self.all(self.linear, tuning)
        for seed in seeds:
            self.all(self.everything, [self.chosen(name, seed) for name in main])
        self.all(
            self.variant, [self.chosen(name, first) for name in methods if name in self.protocol["variants"]]
        )

    def whole(self, method: str, seeds: list[int]) -> None:
        """All cells of a method; its encoders go when they are measured."""
        for rate in self.protocol["rates"] if self.methods[method] is not None else ():
            self.linear(Cell(method, rate, self.protocol["seeds"][0]))
        for seed in seeds:
            self.everything(self.chosen(method, seed))
        shutil.rmtree(self.out / "work" / method, ignore_errors=True)

    def everything(self, cell: Cell) -> None:
        self.linear(cell)
        for fraction in self.protocol["fractions"]:
            self.evaluate(cell, "finetune", fraction)
        for name in self.protocol["benchmarks"]:
            self.benchmark(cell, name)
        if self.protocol["in_depth"] and cell.seed == self.protocol["seeds"][0]:
            self.position_cues(cell)
            self.evaluate_snapshots(cell)
            self.predict(cell)

    def variant(self, cell: Cell) -> None:
        self.linear(cell)
        self.position_cues(cell)

    def chosen(self, method: str, seed: int) -> Cell:
        """The method's cell at the learning rate that was best on the validation cases with the first seed; a
        variant takes the rate of the method that it varies, at one remove or more."""
        like = method
        while like in self.protocol["variants"]:
            like = self.protocol["variants"][like]["like"]
        if self.methods[like] is None:
            return Cell(method, None, seed)
        return Cell(method, best_rate(self.cells.read(), like), seed)

    # ---- Steps of a cell ----

    def make_data(self) -> None:
        if "data" in self.protocol or (self.root / "phantom.json").is_file():
            return
        made = self.root.with_name("unfinished")
        shutil.rmtree(made, ignore_errors=True)
        options = [f"--{name}={value}" for name, value in self.protocol["phantom"].items()]
        self.call(self.out / "work" / "data.log", "data.py", "phantom", "--out", str(made), *options)
        made.rename(self.root)

    def pretrain(self, cell: Cell) -> str:
        """The encoder, made if it is not there; returns what eval_seg.py takes."""
        if cell.rate is None:
            return "random"
        folder = self.work(cell) / "pretrain"
        if not (folder / "encoder.json").is_file():
            settings = {"data.root": self.root} | self.protocol["pretrain"] | self.changes(cell.method)
            settings |= {"optim.lr": cell.rate, "seed": cell.seed, "run.out": folder}
            settings |= {"run.keep_checkpoint": self.protocol["in_depth"]}  # for experiments.position
            self.script(self.log(cell), "train_moco.py", settings)
        encoder = json.loads((folder / "encoder.json").read_text())["sha256"]
        self.check_same_encoder(cell, folder, encoder)
        if self.cells.record(cell).get("pretraining", {}).get("encoder_sha256") != encoder:
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            made = {"encoder_sha256": encoder} | processor(self.protocol["pretrain"])
            kept = pretraining_record(rows, self.protocol["in_depth"])
            self.cells.keep(cell, pretraining=made | kept)
        return str(folder / "encoder.pth")

    def check_same_encoder(self, cell: Cell, folder: Path, encoder: str) -> None:
        """A cell speaks of one encoder. If work/ was deleted it is made again, on the same machine to the
        last bit; on another one it may differ, and what is there is not mixed with results of the new one."""
        before = self.cells.record(cell).get("linear")
        if before and before["encoder_sha256"] != encoder:
            shutil.rmtree(folder)
            raise ConfigError(
                f"{cell.name}: pretrained again, it is another encoder than that of its linear evaluation "
                f"(another machine or version?); delete its line of {self.cells.path} to measure all anew"
            )

    def changes(self, method: str) -> dict:
        """What a method changes of the common settings; a variant also what the method it varies does."""
        own = dict(self.methods[method])
        like = own.pop("like", None)
        return (self.changes(like) if like else {}) | own

    def linear(self, cell: Cell) -> None:
        self.evaluate(cell, "linear")

    def evaluate(
        self, cell: Cell, mode: str, fraction: float | None = None, step: int | None = None, again=False
    ) -> None:
        """Run eval_seg.py with the last encoder or that of `step`, if that is not done or wanted `again`."""
        name = evaluation_name(mode, fraction, step)
        if name in self.cells.record(cell) and not again:
            return
        encoder = self.pretrain(cell)
        if step is not None:
            encoder = str(Path(encoder).with_name(f"encoder_{step}.pth"))
        settings = self.protocol[mode] | {"encoder": encoder, "seed": cell.seed, "data.root": self.root}
        settings |= {"model.arch": self.protocol["pretrain"]["model.arch"], "mode": mode}
        settings |= {"run.out": self.work(cell) / name}
        settings |= {} if fraction is None else {"label_fraction": fraction}
        self.script(self.log(cell), "eval_seg.py", settings)
        results = json.loads((self.work(cell) / name / "results.json").read_text())
        self.cells.keep(cell, **{name: evaluation_record(results) | processor(self.protocol[mode])})
        print(f"{cell.name} {name}: {findings.describe(results)}", flush=True)
        if mode == "finetune" or step is not None:
            shutil.rmtree(self.work(cell) / name)

    def benchmark(self, cell: Cell, name: str) -> None:
        """Run the benchmark's script, if that is not done."""
        done = self.cells.record(cell).get("benchmarks", {})
        if name in done:
            return
        settings = {"data.root": self.root, "model.arch": self.protocol["pretrain"]["model.arch"]}
        settings |= self.protocol["benchmarks"][name]
        script, folder = settings.pop("script"), self.work(cell) / name
        settings |= {"encoder": self.pretrain(cell), "seed": cell.seed, "run.out": folder}
        self.script(self.log(cell), script, settings)
        found = read_results(folder, has_metrics)
        self.cells.keep(cell, benchmarks=done | {name: benchmark_record(found) | processor(settings)})
        measure, metric = next(iter(found["metrics"].items()))
        print(f"{cell.name} {name}: {measure} {percent(metric['value'])} %", flush=True)
        shutil.rmtree(folder)

    def evaluate_snapshots(self, cell: Cell) -> None:
        """The encoders of earlier measurements of collapse: do label-free measures predict Dice?"""
        if cell.rate is None:
            return
        for row in self.cells.record(cell)["pretraining"]["monitor"][1:-1]:
            self.evaluate(cell, "linear", step=row["step"])

    def position_cues(self, cell: Cell) -> None:
        """How well the trained network solves the local task on noise."""
        if cell.rate is None or self.changes(cell.method).get("local.weight") == 0:
            return
        if "position" in self.cells.record(cell):
            return
        self.pretrain(cell)
        folder = self.work(cell) / "pretrain"
        self.call(self.log(cell), "-m", "experiments.position", str(folder))
        self.cells.keep(cell, position=json.loads((folder / "position.json").read_text()))

    def predict(self, cell: Cell) -> None:
        """Masks that the linear decoder gives for the slices shown in the figure."""
        if "masks" in self.cells.record(cell):
            return
        work = self.work(cell)
        # Without its model the cell is from an earlier folder of work.
        self.evaluate(cell, "linear", again=not (work / "linear" / "model.pth").is_file())
        inputs, masks = work / "shown", work / "masks"
        names = figures.shown_slices(self.root)
        for name in names:
            (inputs / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / "images" / name, inputs / name)
        options = ("--predict", str(inputs), "--out", str(masks))
        self.script(self.log(cell), "eval_seg.py", {"run.out": work / "linear"}, *options)
        self.cells.keep(cell, masks={n: base64.b64encode((masks / n).read_bytes()).decode() for n in names})

    def work(self, cell: Cell) -> Path:
        return self.out / "work" / cell.name

    def log(self, cell: Cell) -> Path:
        return self.work(cell) / "log.txt"


def processor(settings: dict) -> dict[str, str]:
    """{"precision", "machine"} of a script that is run here with these settings."""
    run = {name: settings.get(f"run.{name}", "auto") for name in ("device", "precision")}
    process = start_process(to_config(run | {"deterministic": False}))
    gpu = process.device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()
    return {"precision": process.precision, "machine": machine}


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default=str(PROTOCOL), metavar="FILE")
    parser.add_argument("--out", default="runs/ablation", metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods and variants")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="scripts at a time")
    parser.add_argument("--table", action="store_true", help="print the tables of what is finished, and stop")
    parser.add_argument(
        "--figures", metavar="DIR", help="draw the figures of what is finished into DIR, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the protocol")
    args = parser.parse_intermixed_args(argv)
    protocol = read_protocol(args.protocol, args.overrides)
    ablation = Ablation(protocol, Path(args.out), max(1, args.jobs))
    names = list(protocol["methods"]) + list(protocol["variants"])
    if unknown := [name for name in args.only or [] if name not in names]:
        raise ConfigError(f"--only {unknown[0]}: not one of {', '.join(names)}")
    if not args.table and not args.figures:
        check_same_protocol(ablation.out / "protocol.yaml", protocol)
        ablation.stop_on_signals()
        try:
            ablation.run(args.only or names, args.seeds or protocol["seeds"])
        except Stopped:
            print("stopped and saved; the same command resumes the run", file=sys.stderr)
            return STOPPED
    records = ablation.cells.read()
    print(findings.tables(records, protocol))
    if args.figures:
        figures.draw(records, protocol, ablation.root, Path(args.figures))
    return 0


def read_protocol(path: str, overrides: list[str]) -> dict:
    """The protocol with its overrides; the settings of scripts as {"section.key": value}."""
    protocol = to_config(read_yaml(path))
    for text in overrides:
        name, equals, value = text.partition("=")
        section, _, key = name.partition(".")
        if not equals or not isinstance(protocol.get(section), dict) or not key:
            raise ConfigError(f"{text}: expected section.key=value with a section of {path}")
        protocol[section] = to_config({**protocol[section].flat(), key: from_yaml(value)})
    try:
        scripts = {name: to_config(protocol[name]).flat() for name in ("pretrain", "linear", "finetune")}
        groups = {
            name: {method: None if own is None else own.flat() for method, own in protocol[name].items()}
            for name in ("methods", "variants")
            if name in protocol
        }
        benchmarks = {name: own.flat() for name, own in protocol.get("benchmarks", to_config({})).items()}
        plain = {"in_depth": True, "variants": {}} | protocol.plain() | scripts | groups
        plain |= {"benchmarks": benchmarks}
        assert plain["seeds"] and plain["rates"] and all("script" in own for own in benchmarks.values())
        assert "root" in plain.get("data", {}) or {"cases", "slices", "size", "seed"} <= set(plain["phantom"])
    except (KeyError, AttributeError, TypeError, AssertionError):
        raise ConfigError(f"{path}: not a protocol like experiments/configs/ablation.yaml") from None
    return plain


def check_same_protocol(path: Path, protocol: dict) -> None:
    """Write the protocol into the folder; ConfigError if what is there was made under another one, or is
    something else. New methods, variants and seeds may be added, and settings of run (precision, device) are
    the machine's."""
    refuse_other_folder(path.parent, ABLATION, sign=path.name)
    if path.is_file():
        before = read_yaml(path)
        if before == protocol:
            return
        refuse_foreign([path], [], ABLATION)
        for name in ("data", "phantom", "pretrain", "linear", "finetune"):
            if without_machine(before.get(name)) != without_machine(protocol.get(name)):
                raise ConfigError(f"{name}: not that of {path}; choose another --out")
        for group in ("methods", "variants", "benchmarks"):
            for name, own in before.get(group, {}).items():
                if name in protocol[group] and without_machine(protocol[group][name]) != without_machine(own):
                    raise ConfigError(f"{group}.{name}: not that of {path}; choose another name or --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    claim(path.parent, ABLATION)
    write_whole(path, yaml.safe_dump(protocol, sort_keys=False), ABLATION)


if __name__ == "__main__":
    run_script(main, ())
