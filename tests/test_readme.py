"""What the README promises beyond the modules' own tests: copying, configs, launching."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import eval_seg
import train_moco
from engine import config

ROOT = Path(__file__).parent.parent


def test_losses_and_models_can_be_copied_alone(tmp_path):
    """The README's example runs in a folder that holds only these two files."""
    for name in ("losses.py", "models.py"):
        shutil.copy(ROOT / name, tmp_path)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "ablation" not in path.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_purpose(path):
    text = path.read_text()
    script = eval_seg if "mode" in yaml.safe_load(text) else train_moco
    script.check_config(config.load_config(script.DEFAULTS, path, [], script.NULLABLE))
    assert text.startswith("# ") and len(text.splitlines()) <= 30


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b(?:configs|docs)/[\w.-]+\.\w+", text)) | set(re.findall(r"`(\w+\.py)`", text))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_tests_that_the_docs_name_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in (ROOT / "docs").glob("*.md"):
        named = set(re.findall(r"\btest_\w+(?!\.py)\b", page.read_text()))
        missing = [name for name in named if f"def {name}(" not in tests]
        assert missing == [], page.name


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
