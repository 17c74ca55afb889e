"""engine/ownership.py: what may be written over, file by file and folder by folder."""

import json
import os
import shutil

import pytest

from engine.config import ConfigError
from engine.files import write_whole
from engine.ownership import RECORD, claim, contents, refuse_foreign, refuse_other_folder, remove_own

MADE_BY = "a command"


def refused(path, sources=(), made_by=MADE_BY):
    try:
        refuse_foreign([path], sources, made_by)
    except ConfigError as error:
        assert "\n" not in str(error) and "choose another --out" in str(error)
        return True
    return False


def test_only_the_command_that_wrote_a_file_there_may_replace_it(tmp_path):
    path = tmp_path / "a.txt"
    assert not refused(path)
    write_whole(path, "one", MADE_BY)
    assert not refused(path) and refused(path, made_by="another command")
    write_whole(path, "two", MADE_BY)
    assert not refused(path)
    path.write_text("two, changed")
    assert refused(path)
    path.write_text("two")
    assert not refused(path)
    path.write_bytes(b"")  # as a power cut leaves what was not synced
    assert not refused(path)
    path.unlink()
    assert not refused(path)


def test_what_was_not_written_there_is_foreign(tmp_path):
    own = tmp_path / "own/a.txt"
    own.parent.mkdir()
    write_whole(own, "one", MADE_BY)
    (tmp_path / "bare.txt").write_text("one")
    copied = shutil.copy(own, tmp_path / "own/b.txt")
    assert refused(tmp_path / "bare.txt") and refused(copied)
    os.symlink(own, tmp_path / "own/link.txt")
    os.symlink(tmp_path / "nowhere", tmp_path / "own/dangling.txt")
    (tmp_path / "own/folder").mkdir()
    assert all(refused(tmp_path / "own" / name) for name in ("link.txt", "dangling.txt", "folder"))
    write_whole(tmp_path / "own/silent.txt", "one")  # without a name nothing is noted
    assert refused(tmp_path / "own/silent.txt")
    moved = shutil.move(tmp_path / "own", tmp_path / "moved")
    assert not refused(moved / "a.txt")


def test_what_a_command_reads_is_never_its_target(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "one", MADE_BY)
    os.symlink(path, tmp_path / "link.txt")
    os.link(path, tmp_path / "hard.txt")
    for source in (path, str(path), tmp_path / "link.txt", tmp_path / "hard.txt", tmp_path / "x/../a.txt"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"a\.txt: is read by this command"):
            refuse_foreign([path], [source], MADE_BY)
    refuse_foreign([path], [tmp_path / "missing"], MADE_BY)
    with pytest.raises(ConfigError, match=r"b\.txt: two files would become this one"):
        refuse_foreign([tmp_path / "b.txt", tmp_path / "b.txt"], [], MADE_BY)


def test_all_targets_are_looked_at_and_counted(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("of the user's")
    write_whole(tmp_path / "own", "one", MADE_BY)
    with pytest.raises(ConfigError, match=r"\(3 such files\)"):
        refuse_foreign([tmp_path / name for name in ("own", "a", "b", "c", "new")], [], MADE_BY)


def test_own_files_go_and_others_stay(tmp_path):
    for name in "ab":
        write_whole(tmp_path / name, "one", MADE_BY)
    (tmp_path / "b").write_text("changed")
    (tmp_path / "c").write_text("of the user's")
    remove_own([tmp_path / name for name in "abcd"], MADE_BY)
    assert [path.name for path in contents(tmp_path)] == ["b", "c"]


def test_a_folder_is_taken_if_it_is_new_or_empty_or_says_so(tmp_path):
    refuse_other_folder(tmp_path / "new", MADE_BY)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("slurm-12.out", "a.log", "a.err", "config.yaml.med-moco.part", ".DS_Store", RECORD):
        (folder / name).touch()
    refuse_other_folder(folder, MADE_BY)
    claim(folder, MADE_BY)
    claim(folder, MADE_BY)
    (folder / "anything").touch()
    refuse_other_folder(folder, MADE_BY)
    assert (folder / RECORD).read_text().count("folder_of") == 1
    with pytest.raises(ConfigError, match="belongs to a command, not to another"):
        refuse_other_folder(folder, "another")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        refuse_other_folder(tmp_path / "file", MADE_BY)


def test_a_folder_of_an_older_version_is_taken_after_the_line_that_the_message_gives(tmp_path):
    folder = tmp_path / "it's old"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(ConfigError) as plain:
        refuse_other_folder(folder, MADE_BY, sign="config.yaml")
    assert "echo" not in str(plain.value) and "is not empty (notes.txt)" in str(plain.value)
    (folder / "config.yaml").touch()
    with pytest.raises(ConfigError) as told:
        refuse_other_folder(folder, MADE_BY, sign="config.yaml")
    command = str(told.value).partition("made it: ")[2].removesuffix(")")
    assert os.system(command) == 0
    refuse_other_folder(folder, MADE_BY, sign="config.yaml")


def test_a_damaged_record_makes_files_foreign_and_ends_nothing(tmp_path):
    write_whole(tmp_path / "a", "one", MADE_BY)
    whole = (tmp_path / RECORD).read_bytes()
    for damaged in (
        b"",
        whole[:30],
        b"\xff\x00[" + whole,
        b"[]\n3\n{}\n",
        b'{"file": ["a"], "made_by": "a command"}',
    ):
        (tmp_path / RECORD).write_bytes(damaged)
        assert refused(tmp_path / "a")
    (tmp_path / RECORD).write_bytes(whole[:30])  # a full disk
    write_whole(tmp_path / "b", "two", MADE_BY)
    assert not refused(tmp_path / "b")
    assert json.loads((tmp_path / RECORD).read_text().splitlines()[-1])["file"] == "b"
