"""What README and docs promise beyond the modules' own tests: copying, configs, links, launching."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import eval_cls
import eval_det
import eval_seg
import train_moco
from engine import config
from methods import METHODS
from pretraining.method_settings import settle

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_moco_can_be_copied_with_what_it_needs(tmp_path):
    """The README's example runs in a folder that holds only these three files."""
    for name in ("losses.py", "models.py", "moco.py"):
        shutil.copy(ROOT / name, tmp_path)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_augment_can_be_copied_alone(tmp_path):
    shutil.copy(ROOT / "augment.py", tmp_path)
    (tmp_path / "example.py").write_text(AUGMENT_EXAMPLE)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "(4, 1, 32, 32) (4, 1, 32, 32) (4, 5) (4, 5)\n"


AUGMENT_EXAMPLE = """
import sys

import torch

for name in ("torchvision", "PIL", "yaml", "tqdm"):
    sys.modules[name] = None  # importing it fails
from augment import TwoViews

batch = torch.rand(4, 1, 48, 64, generator=torch.Generator().manual_seed(0))
found = TwoViews(size=32)(batch, torch.Generator().manual_seed(1))
assert all(part.isfinite().all() for part in found) and not torch.equal(*found[:2])
print(*(tuple(part.shape) for part in found))
"""


def test_the_example_of_a_new_method_trains(train, monkeypatch):
    """docs/METHODS.md: one class and one line."""
    monkeypatch.setattr(train_moco, "METHODS", dict(METHODS))  # a copy, which is gone after the test
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/METHODS.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr("methods.METHODS", train_moco.METHODS)
    exec(compile(example, "docs/METHODS.md", "exec"), {})
    rows = train("run", "method=alignment", "model.dim=16", "local.weight=0.5", "optim.max_steps=3")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[0] != losses[1]


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "ablation" not in path.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_purpose(path):
    text = path.read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 30
    if path.name == "benchmark.yaml":  # whose settings test_benchmark.py looks at
        return
    scripts = {
        None: train_moco,
        "linear": eval_seg,
        "finetune": eval_seg,
        "knn": eval_cls,
        "frozen": eval_det,
    }
    script = scripts[yaml.safe_load(text).get("mode")]
    # Those of a method go over another file.
    root = [] if path.parent.name == "configs" else ["data.root=data"]
    cfg = config.load_config(script.DEFAULTS, path, root, script.NULLABLE)
    if script is train_moco:
        assert settle(cfg, METHODS, []) == []
    script.check_config(cfg)


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b(?:configs|docs)/[\w.-]+\.\w+", text))
    named |= set(re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", text))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_code_that_the_readme_points_to_exists():
    text = (ROOT / "README.md").read_text()
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    answers = text[text.index("- *Where is the local loss") : text.index("## Copying a piece")]
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", answers)) - {"py"}
    there = r"(?m)(def|class) {0}\b|^{0} =|^  {0}: "  # or a constant, or a setting
    assert {"local_nce_per_image", "fold_whitening", "SliceDataset", "terms", "enqueue"} <= named
    assert [name for name in sorted(named) if not re.search(there.format(name), sources)] == []


def test_configs_and_modules_that_the_docs_name_exist():
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"\b(?:experiments/)?configs/[\w.-]+\.\w+", text))
        named |= {name for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text) if not name.startswith("test_")}
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == [], page.name


def test_tests_that_the_docs_name_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    tests = "".join(files.values())
    for page in PAGES:
        named = set(re.findall(r"\btest_\w+(?:\.py)?\b", page.read_text()))
        named -= {"test_vol", "test_vol_h5"}  # TransUNet's
        missing = [name for name in named if name not in files and f"def {name}(" not in tests]
        assert missing == [], page.name


@pytest.mark.parametrize(
    ("page", "most"), [("README.md", 170), ("docs/RESULTS.md", 250), ("docs/ABLATION.md", 250)]
)
def test_a_page_stays_short(page, most):
    assert len((ROOT / page).read_text().splitlines()) <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere_inside_the_project(page):
    text = page.read_text()
    assert "../" not in text, "a path that leads out of the project"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(markdown):
    """The names by which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("script", ["train_moco.py", "eval_seg.py"])
def test_help_does_not_wait_for_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported torch')")
    command, environment = [sys.executable, ROOT / script, "--help"], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "optim:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [((), "bash launch.sh demo"), (("pretrain",), "error: which config?"), (("fly",), "bash launch.sh demo")],
)
def test_launching_wrongly_says_how(arguments, line):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and line in done.stdout + done.stderr


def test_the_skeleton_of_a_benchmark_runs(phantom, tmp_path, capsys, monkeypatch):
    """docs/EVALUATION.md: one script."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/EVALUATION.md").read_text(), re.DOTALL)[1]
    names = {"__name__": "eval_mine", "__doc__": "A benchmark."}
    exec(example, names)
    arguments = [f"data.root={phantom}", f"run.out={tmp_path / 'run'}", "encoder=random", "model.arch=tiny"]
    assert names["main"](arguments) == 0 and names["main"](arguments) == 0
    assert capsys.readouterr().out.count("spread %") == 2
    assert names["main"](["--compare", str(tmp_path / "run")]) == 0
