"""Every benchmark of some encoders, over seeds, in one table.

    bash launch.sh benchmark configs/benchmark.yaml random runs/moco/encoder.pth torchvision:resnet50.pth
    bash launch.sh benchmark configs/benchmark.yaml random 'runs/full-{seed}' --seeds 0 1 2 --jobs 4
    bash launch.sh benchmark configs/benchmark.yaml random runs/moco common.data.root=data/mine --only knn svm
    bash launch.sh benchmark configs/benchmark.yaml random runs/moco --table      # of what is finished

An encoder is whatever eval_*.py take: a file, the folder of a run, torchvision:PATH or random. {seed} in it
stands for the seed, where each has a pretraining of its own; random weights follow the seed, too. Of one file
seeds differ in what a benchmark draws: the order of training slices, the head's first weights, folds.

What is finished is not run again, and the same command goes on after any stop. A benchmark that fails stops
for that encoder alone, its reason is said at the end, and the exit code is 2. In --out: a folder for each
benchmark, encoder and seed (that of its script), protocol.yaml, table.md, table.csv and table.png.
"""

import argparse
import csv
import io
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import yaml
from tqdm import tqdm

from engine.config import ConfigError, OneLineParser, from_yaml, one_line, read_yaml, to_config
from engine.files import write_whole, written_whole
from engine.ownership import claim, refuse_other_folder
from engine.process import only_warning
from engine.stopping import STOPPED, run_script
from evaluation import encoder_file, results
from experiments.jobs import PROJECT, Jobs, Stopped, without_machine
from experiments.side_by_side import correlations, encoders_of, table
from weights import WeightsError

BENCHMARK = "experiments.benchmark"  # whose folders these are, see engine/ownership.py


@dataclass(frozen=True)
class Cell:
    """One benchmark of one encoder with one seed."""

    benchmark: str
    encoder: str  # as given, with {seed}
    seed: int

    def __str__(self) -> str:
        return f"{self.benchmark}: {label_of(self.encoder)}, seed {self.seed}"


def label_of(encoder: str) -> str:
    return results.encoder_label({"encoder": encoder, "label_fraction": 1})


class Benchmark(Jobs):
    """The protocol, the folder, and what is run of them."""

    def __init__(self, protocol: dict, out: Path, jobs: int):
        super().__init__(jobs)
        self.protocol, self.out, self.failed = protocol, out, {}

    def run(self, cells: list[Cell]) -> None:
        """Those that are not finished; what fails is noted in `failed`."""
        todo = [cell for cell in cells if self.results(cell) is None]
        bar = tqdm(total=len(cells), initial=len(cells) - len(todo), desc="benchmark", disable=None)

        def one(cell: Cell) -> None:
            if (cell.benchmark, cell.encoder) not in self.failed:
                try:
                    self.script(self.folder(cell).with_suffix(".log"), *self.command(cell))
                    name, metric = next(iter(self.results(cell)["metrics"].items()))
                    bar.write(f"{cell}: {name} {results.percent(metric['value'])} %")
                except ConfigError as error:
                    self.failed[cell.benchmark, cell.encoder] = str(error)
                    bar.write(f"{cell}: failed", file=sys.stderr)
            bar.update()

        with bar:
            self.all(one, todo)

    def command(self, cell: Cell) -> tuple[str, dict]:
        """Script and settings."""
        kind = "random" if cell.encoder == "random" else "benchmarks"
        settings = dict(self.protocol[kind][cell.benchmark])
        script = settings.pop("script")
        settings |= {"encoder": encoder_of(cell), "seed": cell.seed, "run.out": self.folder(cell)}
        return script, settings

    def folder(self, cell: Cell) -> Path:
        return self.out / file_name(cell.benchmark) / file_name(label_of(cell.encoder)) / f"seed{cell.seed}"

    def results(self, cell: Cell) -> dict | None:
        """None if it is not finished. Raises ConfigError if they are damaged, or of another encoder."""
        folder = self.folder(cell)
        if not (folder / "results.json").is_file():
            return None
        found = results.read_results(folder, results.has_metrics)
        cfg = to_config({"encoder": encoder_of(cell), "run": {"out": str(folder)}})
        encoder_file.check_same_encoder(cfg, found["encoder_sha256"])
        return found


def encoder_of(cell: Cell) -> str:
    return cell.encoder.replace("{seed}", str(cell.seed))


def file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_.")


# ---- The table -----------------------------------------------------------------------------------


def write_all(out: Path, found: dict[Cell, dict], text: str) -> None:
    with only_warning("no table.md, table.csv"):
        write_whole(out / "table.md", text + "\n")
        write_whole(out / "table.csv", as_csv(found))
    with only_warning("no table.png"):
        draw(out / "table.png", columns_of(found))
    print(f"{out}: table.md, table.csv, table.png")


def columns_of(found: dict[Cell, dict]) -> dict[str, dict[str, list[float]]]:
    """{"knn: mAP %": {encoder: [value of each seed, in percent]}}, of each benchmark's first metric."""
    columns = {}
    for cell, one in found.items():
        name, metric = next(iter(one["metrics"].items()))
        if metric["value"] is not None:
            column = columns.setdefault(f"{cell.benchmark}: {name} %", {})
            column.setdefault(label_of(cell.encoder), []).append(100 * metric["value"])
    return columns


def as_csv(found: dict[Cell, dict]) -> str:
    """Every metric of every cell, 0 to 1, with its 95 % interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["encoder", "benchmark", "seed", "metric", "value", "low", "high"])
    for cell, one in found.items():
        for name, metric in one["metrics"].items():
            ends = metric["interval"] or (None, None)
            writer.writerow([label_of(cell.encoder), cell.benchmark, cell.seed, name, metric["value"], *ends])
    return text.getvalue()


def draw(path: Path, columns: dict[str, dict[str, list[float]]]) -> None:
    """A panel for each benchmark: a line for each encoder, dots for seeds, a stroke at their mean."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    encoders, wide = encoders_of(columns), min(4, len(columns))
    high = -(-len(columns) // wide)
    figure = Figure((2.2 + 2.6 * wide, high * (0.9 + 0.32 * len(encoders))), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False, sharey=True).flatten()
    for panel, (name, column) in itertools.zip_longest(panels, columns.items(), fillvalue=(None, None)):
        if name is None:
            panel.set_axis_off()
            continue
        best = max(column, key=lambda encoder: mean(column[encoder]))
        for y, encoder in enumerate(encoders):
            if encoder in column:
                color = "tab:red" if encoder == best else "tab:blue"
                panel.plot(column[encoder], [y] * len(column[encoder]), "o", color=color, alpha=0.6, ms=5)
                panel.plot([mean(column[encoder])] * 2, [y - 0.35, y + 0.35], color=color, lw=2.5)
        benchmark, _, metric = name.partition(": ")
        panel.set_title(f"{benchmark}\n{metric}", fontsize="medium")
        panel.set(yticks=range(len(encoders)), yticklabels=encoders, ylim=(len(encoders) - 0.4, -0.6))
        panel.grid(alpha=0.3)
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


# ---- The protocol --------------------------------------------------------------------------------


def read_protocol(path: str, overrides: list[str]) -> dict:
    """The file with its overrides: the seeds, and under "benchmarks", and under "random" for random weights,
    all settings of each benchmark as {"section.key": value}. Of what is given several times, a benchmark's
    own wins, then `random`, then `common`, then its config. Raises ConfigError for what is none."""
    content = read_yaml(path)
    try:
        parts = {name: to_config(content[name] or {}).flat() for name in ("common", "random")}
        benchmarks = {name: to_config(own).flat() for name, own in content["benchmarks"].items()}
        scripts = [own["script"] for own in benchmarks.values()]
        seeds = [int(seed) for seed in content["seeds"]]
        if not scripts or not seeds or content.keys() - {"seeds", "common", "random", "benchmarks"}:
            raise ValueError
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ConfigError(f"{path}: not a file like configs/benchmark.yaml") from None
    for text in overrides:
        section, key, value = split_override(text)
        where = benchmarks if section in benchmarks else parts
        where[section] |= to_config({key: from_yaml(value)}).flat()
    protocol = {"seeds": seeds, "benchmarks": {}, "random": {}}
    for name, own in benchmarks.items():
        script = own["script"]
        if not re.fullmatch(r"eval_\w+\.py", str(script)) or not (PROJECT / script).is_file():
            raise ConfigError(f"{path}: {name}: no script {one_line(script)} (eval_seg.py, eval_cls.py, ...)")
        config = {}
        if "config" in own:
            config = to_config(read_yaml(Path(path).parent / own.pop("config"))).flat()
            config.pop("run.out", None)
        protocol["benchmarks"][name] = config | parts["common"] | own
        protocol["random"][name] = config | parts["common"] | parts["random"] | own
    return protocol


def split_override(text: str) -> tuple[str, str, str]:
    """ "knn.optim.steps=10" -> knn, optim.steps, 10."""
    name, _, value = text.partition("=")
    section, _, key = name.partition(".")
    return section, key, value


def is_override(text: str, content: dict) -> bool:
    section, key, _ = split_override(text)
    return "=" in text and bool(key) and (section in ("common", "random") or section in content)


def check_same_protocol(out: Path, protocol: dict) -> None:
    """Write the protocol into the folder; ConfigError if what is there was made under another one, or is
    something else. Benchmarks, encoders and seeds may be added, and settings of run are the machine's."""
    refuse_other_folder(out, BENCHMARK)
    path, before = out / "protocol.yaml", {}
    if path.is_file():
        before = read_yaml(path)
    whole = {"seeds": protocol["seeds"]}
    for kind in ("benchmarks", "random"):
        there, here = before.get(kind) or {}, protocol[kind]
        for name in [name for name in there if name in here]:
            if without_machine(here[name]) != without_machine(there[name]):
                raise ConfigError(f"{name}: its settings are not those of {path}; choose another --out")
        whole[kind] = there | here
    out.mkdir(parents=True, exist_ok=True)
    claim(out, BENCHMARK)
    write_whole(path, yaml.safe_dump(whole, sort_keys=False))


def check_encoders(encoders: list[str], seeds: list[int]) -> None:
    """ConfigError if one is not there, or if two of them cannot be told apart."""
    names = {}
    for encoder in encoders:
        if (other := names.setdefault(file_name(label_of(encoder)), encoder)) != encoder:
            raise ConfigError(f"{other} and {encoder} would share the name {label_of(encoder)}")
        for seed in seeds:
            path = encoder_file.path_of(to_config({"encoder": encoder_of(Cell("", encoder, seed))}))
            if path and not path.is_file():
                raise ConfigError(f"{path}: no such file of weights")


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="as configs/benchmark.yaml")
    words = "and changes of the config: common.KEY=VALUE, NAME.KEY=VALUE"
    parser.add_argument("words", nargs="*", metavar="ENCODER", help=words)
    parser.add_argument("--out", default="runs/benchmark", metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="scripts at a time")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and stop")
    args = parser.parse_intermixed_args(argv)
    names = read_protocol(args.config, [])["benchmarks"]
    overrides = [word for word in args.words if is_override(word, names)]
    encoders = list(dict.fromkeys(word for word in args.words if word not in overrides))
    protocol = read_protocol(args.config, overrides)
    chosen, seeds = args.only or [*names], args.seeds or protocol["seeds"]
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(f"--only {unknown[0]}: not one of {', '.join(names)}")
    if not encoders:
        raise ConfigError("which encoders? Files, folders of runs, torchvision:PATH or random")
    check_encoders(encoders, seeds)
    cells = [Cell(*one) for one in itertools.product(chosen, encoders, seeds)]
    benchmark = Benchmark(protocol, Path(args.out), max(1, args.jobs))
    if not args.table:
        check_same_protocol(benchmark.out, protocol)
        benchmark.stop_on_signals()
        try:  # seed by seed, so that what is there can be compared at any time
            benchmark.run(sorted(cells, key=lambda cell: seeds.index(cell.seed)))
        except Stopped:
            print("stopped and saved; the same command goes on", file=sys.stderr)
            return STOPPED
    found = {cell: one for cell in cells if (one := benchmark.results(cell)) is not None}
    if found:
        columns = columns_of(found)
        text = "\n".join([table(columns), *correlations(columns)])
        print(text, flush=True)
        if not args.table:
            write_all(benchmark.out, found, text)
    elif args.table:
        raise ConfigError(f"--table: nothing is finished in {benchmark.out}")
    return report_failures(benchmark.failed)


def report_failures(failed: dict[tuple[str, str], str]) -> int:
    for (benchmark, encoder), text in failed.items():
        print(f"error: {benchmark}: {label_of(encoder)}: {text}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    run_script(main, (WeightsError,))
