"""No command that writes takes the place of a file that it did not write there itself.

Each command runs once in a fresh folder, which shows what it writes; then on folders with foreign files of
just these names: one line, exit code 2, and nothing is changed, added or removed.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING
from handmade import ROOT, one_line_of, random_set, run, save_volume

import eval_seg
import train_moco
from engine.config import ConfigError
from experiments import ablation, position

FOREIGN = b"foreign: the only copy of somebody's work"
EVALUATION = ["model.arch=tiny", "model.output_stride=16", "data.workers=0", "run.device=cpu"]
EVALUATION += ["optim.steps=2", "optim.batch_size=4", "eval.every=1"]


class Bench:
    """Inputs, read by every command, and where it writes: FOLDER/out."""

    def __init__(self, root, phantom, nibabel):
        self.root, self.phantom = root, phantom
        for case in ("one", "two"):
            voxels = np.random.default_rng(len(case)).integers(-200, 200, (6, 5, 3)).astype(np.int16)
            save_volume(nibabel, root / "cts" / f"{case}.nii.gz", voxels)
            save_volume(nibabel, root / "labels" / f"{case}.nii.gz", (voxels > 0).astype(np.uint8))
        (root / "mixed/sub").mkdir(parents=True)
        slice = next((phantom / "images").glob("*/000.png"))
        shutil.copy(slice, root / "mixed/a.png")
        shutil.copy(slice, root / "mixed/sub/b.png")
        shutil.copy(root / "cts/one.nii.gz", root / "mixed/ct.nii.gz")
        (root / "tiny.yaml").write_text(TINY_TRAINING + "run: {save_steps: 1}\n")
        self.model = root / "model"
        self.call("evaluate", self.model)

    def call(self, command, out):
        """Exit code of a command that writes to `out`; the scripts raise what data.py prints."""
        phantom, volumes = (
            ("--root", self.phantom),
            ("--images", self.root / "cts", "--labels", self.root / "labels"),
        )
        settings = (f"data.root={self.phantom}", f"run.out={out}")
        match command:
            case "phantom":
                return self.data("phantom", "--cases", 3, "--slices", 2, "--size", 16, "--out", out)
            case "slice":
                return self.data("slice", *volumes, "--workers", 1, "--out", out)
            case "pack":
                return self.data("pack", *phantom, "--list", "train.txt", "--out", out / "packed")
            case "show":
                return self.data("show", *phantom, "--out", out / "page.png")
            case "pretrain":
                return train_moco.main(["--config", str(self.root / "tiny.yaml"), *settings])
            case "evaluate":
                return eval_seg.main([*EVALUATION, *settings, "encoder=random"])
            case "predict":
                return self.predict(self.root / "mixed", out)

    def predict(self, source, out):
        words = (f"run.out={self.model}", "--predict", source, "--out", out)
        return eval_seg.main([*EVALUATION, *map(str, words)])

    def data(self, *argv):
        from prepare import commands

        return commands.main([*map(str, argv)])


COMMANDS = ("phantom", "slice", "pack", "show", "pretrain", "evaluate", "predict")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, phantom):
    nibabel = pytest.importorskip("nibabel")
    return Bench(tmp_path_factory.mktemp("bench"), phantom, nibabel)


def contents(folder):
    """{relative name: sha256} of all files, links as what they point to; folders with None."""
    found = {}
    for parent, folders, files in os.walk(folder):
        found |= {os.path.relpath(os.path.join(parent, name), folder): None for name in folders}
        for name in files:
            path = Path(parent) / name
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            found[os.path.relpath(path, folder)] = hashlib.sha256(content).hexdigest()
    return found


def refuses(bench, capsys, command, out):
    """The one line; after which all is as it was."""
    before = contents(out)
    capsys.readouterr()
    try:
        code = bench.call(command, out)
        line = capsys.readouterr().err
    except ConfigError as error:  # of which run_script makes the line and the code
        code, line = 2, f"{error}\n"
    assert code == 2 and one_line_of(line), line
    assert contents(out) == before
    assert "choose" in line or "other arguments" in line or "JSON" in line, line
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_foreign_files_of_the_names_that_a_command_writes(bench, tmp_path, capsys, command):
    own = tmp_path / "own"
    assert bench.call(command, own) == 0
    written = [name for name, content in contents(own).items() if content and Path(name).name != ".med-moco"]
    assert written
    for number, name in enumerate(sorted(written)):
        path = tmp_path / f"foreign{number}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(FOREIGN)
        refuses(bench, capsys, command, tmp_path / f"foreign{number}")
    shutil.copytree(own, tmp_path / "copy", ignore=shutil.ignore_patterns(".med-moco"))
    if command != "phantom":  # which says that it is there already
        refuses(bench, capsys, command, tmp_path / "copy")
    assert bench.call(command, own) == 0  # again, over its own


@pytest.mark.parametrize("command", ["slice", "pack", "show", "predict"])
def test_own_files_that_somebody_has_changed(bench, tmp_path, capsys, command):
    assert bench.call(command, tmp_path / "own") == 0
    written = [name for name, content in contents(tmp_path / "own").items() if content]
    for name in written:
        if "images/" in name or "masks/" in name or name.endswith(".med-moco"):
            continue  # of a case that is up to date, which is not written again
        changed = shutil.copytree(tmp_path / "own", tmp_path / "changed")
        with open(changed / name, "ab") as file:
            file.write(b" ")
        if not name.startswith("sliced/"):
            assert str(changed / name) in refuses(bench, capsys, command, changed)
        shutil.rmtree(changed)


def test_corrected_masks_survive_slicing_with_other_options(bench, tmp_path, capsys):
    """And those of a case whose files have not changed are not looked at."""
    out = tmp_path / "set"
    assert bench.call("slice", out) == 0
    mask = out / "masks/one/0001.png"
    mask.write_bytes((out / "masks/one/0000.png").read_bytes() + b" ")
    assert bench.call("slice", out) == 0 and mask.read_bytes().endswith(b" ")
    before = contents(out)
    words = ("--images", bench.root / "cts", "--labels", bench.root / "labels", "--axis", 0, "--out", out)
    code, _, error = run(capsys, "slice", *words)
    assert code == 2 and one_line_of(error) and str(mask) in error and contents(out) == before
    mask.unlink()
    code, _, error = run(capsys, "slice", *words)
    assert code == 0, error
    # Six sagittal slices now and three axial ones before; the other way round nothing is left over.
    assert len(list((out / "masks/one").glob("*.png"))) == 6
    assert bench.call("slice", out) == 0
    for part in ("images", "masks"):
        assert sorted(path.name for path in (out / part / "one").glob("*.png")) == [
            f"000{i}.png" for i in range(3)
        ]
    code, _, error = run(capsys, "slice", "--images", bench.root / "cts", "--out", out)
    assert code == 0 and not list((out / "masks").rglob("*.png")), error


def test_lists_of_the_users_in_a_set(bench, tmp_path, capsys):
    out = tmp_path / "set"
    assert bench.call("slice", out) == 0
    assert not (out / "val.txt").exists()  # of two cases
    (out / "val.txt").write_text("one/0000.png\n")
    assert "val.txt" in refuses(bench, capsys, "slice", out)
    (out / "val.txt").unlink()
    (out / "notes.txt").write_text("other files do not matter")
    assert bench.call("slice", out) == 0 and (out / "notes.txt").exists()


def test_sets_are_not_made_inside_of_other_folders(bench, tmp_path, capsys):
    random_set(tmp_path / "hand")
    for command in ("slice", "phantom", "pretrain", "evaluate"):
        assert "choose" in refuses(bench, capsys, command, tmp_path / "hand")
    out = tmp_path / "set"
    assert bench.call("slice", out) == 0
    for command in ("phantom", "pretrain", "evaluate"):
        assert "belongs to data.py slice" in refuses(bench, capsys, command, out)
    assert "belongs to eval_seg.py" in refuses(bench, capsys, "pretrain", bench.model)


# ---- What a command reads --------------------------------------------------------------------------------


def test_predictions_never_replace_what_is_predicted(bench, tmp_path):
    for source, out in (
        ("mixed/ct.nii.gz", "mixed"),
        ("mixed", "mixed"),
        ("mixed", "link"),
        ("link/ct.nii.gz", "mixed"),
        ("mixed/sub/b.png", "mixed/sub/../sub"),
        ("aliases", "mixed"),
    ):
        root = tmp_path / "inputs"
        shutil.copytree(bench.root / "mixed", root / "mixed")
        os.symlink(root / "mixed", root / "link")
        (root / "aliases").mkdir()
        os.symlink(root / "mixed/a.png", root / "aliases/a.png")
        before = contents(root)
        with pytest.raises(
            ConfigError, match="is read by this command, which would write over it; choose anoth"
        ):
            bench.predict(root / source, root / out)
        assert contents(root) == before
        shutil.rmtree(root)


def test_predictions_that_would_become_one_file(bench, tmp_path):
    shutil.copytree(bench.root / "mixed", tmp_path / "mixed")
    np.save(tmp_path / "mixed/a.npy", np.zeros((16, 16), np.int16))
    with pytest.raises(ConfigError, match=r"a\.png: two files would become this one"):
        bench.predict(tmp_path / "mixed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predictions_below_what_is_predicted_are_no_input(bench, tmp_path, capsys):
    shutil.copytree(bench.root / "mixed", tmp_path / "mixed")
    for _ in range(2):
        assert bench.predict(tmp_path / "mixed", tmp_path / "mixed/pred") == 0
    names = {name for name, content in contents(tmp_path / "mixed/pred").items() if content}
    assert {name for name in names if not name.endswith(".med-moco")} == {"a.png", "ct.nii.gz", "sub/b.png"}
    assert "3 files there are not taken as input" in capsys.readouterr().out
    shutil.copytree(bench.root / "mixed", tmp_path / "only/pred")
    with pytest.raises(ValueError, match="all slices and volumes there lie below --out"):
        bench.predict(tmp_path / "only", tmp_path / "only/pred")
    assert bench.predict(tmp_path / "only/pred", tmp_path / "only") == 0  # the other way round


def test_an_edited_prediction_stays(bench, tmp_path):
    """Also one that keeps all of the header, as segmentation editors do."""
    import nibabel

    bench.predict(bench.root / "mixed", tmp_path / "out")
    path = tmp_path / "out/ct.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(1 - np.asarray(image.dataobj), image.affine, image.header), path)
    edited = path.read_bytes()
    with pytest.raises(
        ConfigError, match=r"ct\.nii\.gz: would be written over, and is not as eval_seg\.py --pre"
    ):
        bench.predict(bench.root / "mixed", tmp_path / "out")
    assert path.read_bytes() == edited


def test_pages_and_packed_sets_never_replace_a_part_of_the_set(phantom, tmp_path, capsys):
    root = shutil.copytree(phantom, tmp_path / "set")
    name = (root / "train.txt").read_text().split()[0]
    for target in (root / "images" / name, root / "masks" / name, root / "train.txt", root / "set.json"):
        before = contents(tmp_path)
        code, _, error = run(capsys, "show", "--root", root, "--list", "train.txt", "--out", target)
        assert code == 2 and one_line_of(error) and contents(tmp_path) == before
    code, _, error = run(capsys, "pack", "--root", root, "--list", "train.txt", "--out", root / "set")
    assert code == 2 and "set.json" in error and contents(tmp_path) == before
    assert run(capsys, "pack", "--root", root, "--list", "train.txt", "--out", tmp_path / "packed")[0] == 0
    before = contents(tmp_path)
    for out in (tmp_path / "packed", tmp_path / "packed.npy", tmp_path / "set/../packed"):
        code, _, error = run(capsys, "pack", "--root", tmp_path / "packed", "--list", "x.txt", "--out", out)
        assert code == 2 and "is read by this command" in error and contents(tmp_path) == before


def test_slicing_into_what_is_sliced(bench, tmp_path, capsys):
    out = tmp_path / "set"
    assert bench.call("slice", out) == 0
    shutil.copy(bench.root / "cts/one.nii.gz", out / "images/one.nii.gz")
    before = contents(tmp_path)
    both = ("--images", bench.root / "cts", "--labels", bench.root / "labels", "--out", out)
    for words in (
        ("--images", out / "images", "--out", out),
        ("--images", bench.root / "cts", "--out", bench.root / "cts"),
        (*both, "--classes", out / "set.json"),
        (*both, "--label-map", out / "sliced/../set.json"),
        (*both, "--split", out / "sliced/one.json", "--axis", 0),
    ):
        code, _, error = run(capsys, "slice", *words)
        assert code == 2 and one_line_of(error) and contents(tmp_path) == before, error


# ---- Runs ------------------------------------------------------------------------------------------------


def test_a_run_never_replaces_the_weights_it_starts_from(bench, tmp_path):
    assert bench.call("pretrain", tmp_path / "run") == 0
    for name in ("checkpoint.pth", "checkpoint.pth.previous"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    os.symlink(tmp_path / "run", tmp_path / "link")
    before = contents(tmp_path)
    settings = (f"data.root={bench.phantom}", f"model.init={tmp_path / 'link/encoder.pth'}")
    with pytest.raises(ConfigError, match="starts from .*would write over it"):
        train_moco.main(["--config", str(bench.root / "tiny.yaml"), *settings, f"run.out={tmp_path / 'run'}"])
    assert contents(tmp_path) == before


def test_settings_that_somebody_wrote_into_config_yaml_stay(bench, tmp_path):
    out = shutil.copytree(bench.model, tmp_path / "run")
    for name in ("results.json", "cases.csv"):
        (out / name).unlink()
    config = out / "config.yaml"
    commented = "# chosen with care\n" + config.read_text().replace(str(bench.model), str(out))
    config.write_text(commented)
    words = ("--config", str(config))
    with pytest.raises(ConfigError, match=r"config\.yaml: would be written over"):
        eval_seg.main([*words, "optim.lr=0.25"])
    assert eval_seg.main([*words]) == 0  # the same settings
    assert config.read_text() == commented and (out / "results.json").exists()


def test_launching_into_a_foreign_folder(bench, tmp_path):
    """launch.sh, too, removes and believes the marker of a stop only where a run is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/stopped.json").write_text('{"step": 1, "reason": "SIGUSR1"}')
    before = contents(tmp_path)
    command = ["bash", "launch.sh", "pretrain", bench.root / "tiny.yaml", "model.arch=resnet18"]
    command += [f"data.root={bench.phantom}", f"run.out={tmp_path / 'mine'}"]
    environment = os.environ | {"GPUS": "2", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and one_line_of(done.stderr) and "not empty (stopped.json)" in done.stderr
    assert contents(tmp_path) == before


def test_ablations_and_position_cues(tmp_path):
    for name in ("protocol.yaml", "cells.jsonl", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(FOREIGN)
        with pytest.raises(ConfigError, match="is not empty .* and not a folder of experiments.ablation"):
            ablation.main(["--out", str(tmp_path / name)])
        assert len(contents(tmp_path / name)) == 1
    (tmp_path / "position.json").write_bytes(FOREIGN)
    with pytest.raises(ConfigError, match=r"position\.json: would be written over"):
        position.main([str(tmp_path)])


# ---- Kills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["phantom", "slice", "pack", "show", "predict", "evaluate"])
def test_after_a_kill_the_same_command_is_never_refused(bench, tmp_path, monkeypatch, command):
    """Killed before or after a file has got its name, at seeded random files, again and again."""
    whole = tmp_path / "whole"
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (replace(*names), replaced.append(names)))
    assert bench.call(command, whole) == 0
    rng = random.Random(0)

    def killed_at(count, after):
        def replace_or_die(old, new):
            nonlocal count
            count -= 1
            if count < 0 and not after:
                shutil.copy(old, str(old) + "-")
                raise Killed
            replace(old, new)
            if count < 0:
                raise Killed

        return replace_or_die

    out = tmp_path / "killed"
    for _ in range(6):
        monkeypatch.setattr(os, "replace", killed_at(rng.randrange(len(replaced)), rng.random() < 0.5))
        try:
            assert bench.call(command, out) == 0
        except Killed:
            for copy in out.rglob("*.part-"):  # what a real kill would have left
                copy.rename(str(copy)[:-1])
    monkeypatch.setattr(os, "replace", replace)
    assert bench.call(command, out) == 0
    last = {name: content for name, content in contents(out).items() if ".med-moco" not in name}
    first = {name: content for name, content in contents(whole).items() if ".med-moco" not in name}
    assert last.keys() == first.keys()
    if command in ("phantom", "pack", "show", "predict"):
        assert last == first


class Killed(BaseException):
    """What no handler expects."""


def test_a_page_of_an_older_version_is_moved_away_by_the_user(phantom, tmp_path, capsys):
    words = ("show", "--root", phantom, "--out", tmp_path / "page.png")
    assert run(capsys, *words)[0] == 0
    (tmp_path / ".med-moco").unlink()
    code, _, error = run(capsys, *words)
    assert code == 2 and "move it away or choose another --out" in error
    (tmp_path / "page.png").rename(tmp_path / "old.png")
    assert run(capsys, *words)[0] == 0
    assert json.loads((tmp_path / ".med-moco").read_text())["made_by"] == "data.py show"


def test_a_second_process_ends_with_the_first(monkeypatch, tmp_path):
    """Only the main process looks; what it has found is raised on the others."""
    from engine.ownership import all_refuse, refuse_other_folder
    from engine.process import Process

    (tmp_path / "notes.txt").touch()
    sent = []
    main, other = (Process(rank, 2, torch.device("cpu"), "fp32") for rank in (0, 1))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", sent.extend)
    with pytest.raises(ConfigError) as first:
        all_refuse(main, refuse_other_folder, tmp_path, "train_moco.py")
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda got: got.__setitem__(0, sent[0]))
    with pytest.raises(ConfigError) as second:
        all_refuse(other, lambda: pytest.fail("looks, too"))
    assert str(first.value) == str(second.value)
