"""The shape of the project: what may import what, and what an import loads."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "ct", "prepare", "pretraining", "evaluation", "experiments")
BELOW_THE_SCRIPTS = {"data", "models", "moco", "weights", "losses", "augment", "collapse", "ct", "engine"}
MAY_IMPORT = {  # of the project, besides modules of its own room; a new module or room has to be added here
    "losses": set(),
    "augment": set(),
    "models": {"losses"},
    "moco": {"losses", "models"},
    "methods": {"losses", "models", "moco", "spark"},
    "spark": {"losses", "models", "moco"},
    "weights": {"losses", "models"},
    "collapse": {"losses"},
    "data": {"ct", "engine", "augment"},  # and prepare, in the lines that are run as a script
    "train_moco": BELOW_THE_SCRIPTS | {"pretraining", "methods"},
    "eval_seg": BELOW_THE_SCRIPTS | {"evaluation"},
    "eval_cls": BELOW_THE_SCRIPTS | {"evaluation"},
    "eval_det": BELOW_THE_SCRIPTS | {"evaluation"},
    "engine": set(),
    "ct": {"engine"},
    "prepare": {"ct", "data", "augment", "losses", "models", "weights", "engine"},
    "pretraining": BELOW_THE_SCRIPTS,
    "evaluation": BELOW_THE_SCRIPTS,
    "experiments": BELOW_THE_SCRIPTS | {"prepare", "pretraining", "evaluation", "train_moco", "eval_seg"},
}
THIRD_PARTIES = {  # of these; of the others, whatever requirements.txt has
    "losses": {"torch"},
    "augment": {"torch"},
    "models": {"torch", "torchvision"},
    "moco": {"torch"},
    "weights": {"torch", "torchvision"},
    "collapse": {"torch"},
    "engine": {"torch", "yaml", "tqdm", "numpy"},
}
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}


def required(file):
    names = re.findall(r"^[\w-]+", (ROOT / file).read_text(), re.MULTILINE)
    return {IMPORTED_AS.get(name, name) for name in names}


class Imports(ast.NodeVisitor):
    """(name, whether it is inside a function, whether only as a script) of all imports of a module."""

    def __init__(self, path):
        self.found, self.inside, self.as_script = [], False, False
        self.visit(ast.parse(path.read_text()))

    def add(self, name):
        self.found.append((name, self.inside, self.as_script))

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        assert node.level == 0, "relative imports would hide what is imported"
        for alias in node.names:
            self.add(f"{node.module}.{alias.name}")

    def visit_FunctionDef(self, node):
        before, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = before

    def visit_If(self, node):
        before, self.as_script = self.as_script, ast.unparse(node.test) == "__name__ == '__main__'"
        self.generic_visit(node)
        self.as_script = before


PATHS = sorted(ROOT.glob("*.py")) + [path for room in ROOMS for path in sorted((ROOT / room).glob("**/*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
IMPORTS = {module: Imports(path).found for module, path in MODULES.items()}
OURS = {module.split(".")[0] for module in MODULES}


def top(name):
    return name.split(".")[0]


def test_every_folder_of_code_is_a_room_of_the_table():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == {*ROOMS, "tests"}
    assert {top(module) for module in MODULES} == {*MAY_IMPORT}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_run_downwards_only(place):
    """Those inside functions too, which otherwise come to light only when they are called."""
    wrong, upwards = [], []
    for module, imports in IMPORTS.items():
        for name, _, as_script in imports if top(module) == place else []:
            if top(name) in OURS - {place} - MAY_IMPORT[place]:
                (upwards if as_script else wrong).append(f"{module} imports {name}")
    assert wrong == []
    assert upwards == (["data imports prepare.commands.main"] if place == "data" else [])


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_third_parties(place):
    """Extras are imported where they are used: without them everything else works."""
    allowed, extras = (
        THIRD_PARTIES.get(place, required("requirements.txt")),
        required("requirements-extra.txt"),
    )
    for module, imports in IMPORTS.items():
        for name, inside, _ in imports if top(module) == place else []:
            if top(name) not in OURS | sys.stdlib_module_names:
                assert top(name) in allowed or (inside and top(name) in extras), f"{module} imports {name}"


def test_requirements_are_what_is_imported():
    used = {top(name) for imports in IMPORTS.values() for name, *_ in imports}
    used -= OURS | sys.stdlib_module_names | required("requirements-extra.txt")
    assert used == required("requirements.txt")


def test_no_circles():
    graph = {}
    for module, imports in IMPORTS.items():
        names = [name for name, _, as_script in imports if not as_script and top(name) in OURS]
        graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    graph = {module: imported & {*MODULES} for module, imported in graph.items()}
    assert {*TopologicalSorter(graph).static_order()} == {*MODULES}  # a CycleError names the circle


def test_the_pretraining_script_takes_a_handful_from_the_project():
    statements = [
        node
        for node in ast.walk(ast.parse((ROOT / "train_moco.py").read_text()))
        if (isinstance(node, ast.ImportFrom) and top(node.module) in OURS)
        or (isinstance(node, ast.Import) and any(top(alias.name) in OURS for alias in node.names))
    ]
    assert len(statements) <= 13


def test_scripts_load_nothing_that_makes_data_sets():
    code = "import sys, data, train_moco, eval_seg; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {top(name) for name in done.stdout.split()}
    assert {"ct", "engine", "models"} <= loaded  # or we would look in the wrong place
    assert not loaded & {"prepare", "experiments", "nibabel", "matplotlib", "tensorboard"}
