"""prepare/pairing.py: which volumes are images and which belong together, and when to ask."""

import json

import pytest
from handmade import put

from ct.slices import DataError
from prepare.pairing import pair_volumes


def files(root, *names):
    for name in names:
        put(root / (name if ".n" in name.lower() or ".txt" in name else f"{name}.nii.gz"), b"")
    return root


def found(pairs, root):
    """{case: (image, labels)}, the paths below root and without their suffix."""

    def short(path):
        return path and path.relative_to(root).as_posix().split(".")[0]

    return {pair.case: (short(pair.image), short(pair.labels)) for pair in pairs}


LIVER = [f"images/liver_{number:04d}" for number in range(4)]


# ---- Channels ----


def test_four_numbered_cases_are_not_channels_of_one_without_evidence(tmp_path, capsys):
    files(tmp_path, *LIVER)
    with pytest.raises(DataError, match="liver_0000 to liver_0003.*--channels 4.*--channels 1: every file"):
        pair_volumes(tmp_path / "images", None)
    assert [*found(pair_volumes(tmp_path / "images", None, channels=1), tmp_path)] == [
        f"liver_{number:04d}" for number in range(4)
    ]
    pairs = pair_volumes(tmp_path / "images", None, channels=4)
    assert found(pairs, tmp_path) == {"liver": ("images/liver_0000", None)}
    assert "other channels (left out): 3: liver_0001" in capsys.readouterr().out
    with pytest.raises(DataError, match="liver_0002.*channel 2 of an image of 2"):
        pair_volumes(tmp_path / "images", None, channels=2)


@pytest.mark.parametrize(
    "labels, cases, reason",
    [
        ([f"liver_{number:04d}" for number in range(4)], 4, "labels have these names"),
        (["liver"], 1, "labels have the names without it"),
        ([f"seg_{number:04d}" for number in range(4)], 4, "there are as many labels"),
        (["seg-0000", "seg-0001"], None, None),
    ],
)
def test_labels_are_evidence(tmp_path, capsys, labels, cases, reason):
    files(tmp_path, *LIVER, *(f"labels/{name}" for name in labels))
    if cases is None:
        with pytest.raises(DataError, match="--channels"):
            pair_volumes(tmp_path / "images", tmp_path / "labels")
        return
    pairs = pair_volumes(tmp_path / "images", tmp_path / "labels")
    assert len(pairs) == cases and all(pair.labels for pair in pairs)
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("key", ["channel_names", "modality"])
@pytest.mark.parametrize("channels, cases", [(4, 1), (1, 4)])
def test_dataset_json_is_evidence(tmp_path, capsys, key, channels, cases):
    files(tmp_path, *(f"{name.replace('images', 'imagesTr')}" for name in LIVER))
    about = {key: {str(number): "CT" for number in range(channels)}}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    assert len(pair_volumes(tmp_path / "imagesTr", None)) == cases
    assert "dataset.json" in capsys.readouterr().out


def test_the_same_channels_in_several_cases_are_evidence(tmp_path, capsys):
    files(tmp_path, *(f"images/{case}_000{channel}" for case in "ab" for channel in range(2)))
    pairs = found(pair_volumes(tmp_path / "images", None), tmp_path)
    assert pairs == {"a": ("images/a_0000", None), "b": ("images/b_0000", None)}
    assert "the same in 2 cases" in capsys.readouterr().out
    files(tmp_path, "images/c_0000")
    with pytest.raises(DataError, match="--channels"):
        pair_volumes(tmp_path / "images", None)


@pytest.mark.parametrize(
    "names, cases",
    [
        (["img_0001", "img_0002", "img_0003"], ["img_0001", "img_0002", "img_0003"]),
        (["a_0001", "a_0002", "b_0001", "b_0002"], ["a_0001", "a_0002", "b_0001", "b_0002"]),
        (["Case_00001_0000", "Case_00002_0000"], ["Case_00001", "Case_00002"]),
        (["liver_10", "liver_9"], ["liver_9", "liver_10"]),
    ],
)
def test_names_that_leave_no_doubt(tmp_path, names, cases):
    files(tmp_path, *(f"images/{name}" for name in names))
    assert [*found(pair_volumes(tmp_path / "images", None), tmp_path)] == cases


# ---- By name or number ----


def test_the_conclusion_is_printed_with_an_example(tmp_path, capsys):
    files(tmp_path, "img/img0001", "img/img0002", "label/label0002")
    assert len(pair_volumes(tmp_path / "img", tmp_path / "label")) == 2
    output = capsys.readouterr().out
    assert "paired 1 of 2 images with labels, by number: img0002.nii.gz with label0002.nii.gz" in output
    assert "images without labels (for pretraining only): 1: img0001.nii.gz" in output


def test_pair_decides(tmp_path):
    files(tmp_path, "img/a_1", "img/b_2", "label/a_2", "label/b_1")
    with pytest.raises(DataError, match="no image has the name"):
        pair_volumes(tmp_path / "img", tmp_path / "label", by="name")
    pairs = found(pair_volumes(tmp_path / "img", tmp_path / "label", by="number"), tmp_path)
    assert pairs == {"a_1": ("img/a_1", "label/b_1"), "b_2": ("img/b_2", "label/a_2")}
    files(tmp_path, "label/a_1")
    with pytest.raises(DataError, match="both count as 1;"):
        pair_volumes(tmp_path / "img", tmp_path / "label", by="number")
    assert found(pair_volumes(tmp_path / "img", tmp_path / "label"), tmp_path)["a_1"][1] == "label/a_1"


def test_all_numbers_of_a_name_count(tmp_path):
    """abd_01_v2 does not belong to seg_02_v2."""
    files(tmp_path, "img/abd_01_v2", "img/abd_02_v3", "img/abd_03_v1", "label/seg_02_v2", "label/seg_01_v2")
    pairs = found(pair_volumes(tmp_path / "img", tmp_path / "label"), tmp_path)
    assert [labels for _, labels in pairs.values()] == ["label/seg_01_v2", None, None]


@pytest.mark.parametrize(
    "image, labels",
    [
        ("anna_ct", "anna_seg"),
        ("volume-0", "segmentation-0"),
        ("CT_anna", "anna mask"),
        ("Anna", "anna_gt"),
    ],
)
def test_words_for_images_and_labels_do_not_count(tmp_path, image, labels):
    files(tmp_path, f"img/{image}.nii", "img/other_ct.nii", f"label/{labels}.nii")
    pairs = pair_volumes(tmp_path / "img", tmp_path / "label")
    assert {pair.image.stem: pair.labels and pair.labels.stem for pair in pairs}[image] == labels


def test_images_and_labels_in_one_folder(tmp_path, capsys):
    files(tmp_path, *(f"all/{case}_{what}" for case in ("p1", "p2") for what in ("ct", "seg")))
    pairs = found(pair_volumes(tmp_path / "all", tmp_path / "all"), tmp_path)
    assert pairs == {f"{case}_ct": (f"all/{case}_ct", f"all/{case}_seg") for case in ("p1", "p2")}
    assert "all: masks by their names: 2: p1_seg.nii.gz, p2_seg.nii.gz\n" in capsys.readouterr().out


def test_an_image_is_never_its_own_labels(tmp_path):
    files(tmp_path, "all/p1", "all/p2")
    with pytest.raises(DataError, match="its own labels.*patterns|its own labels.*--images"):
        pair_volumes(tmp_path / "all", tmp_path / "all")
    with pytest.raises(DataError, match="its own labels"):
        pair_volumes(tmp_path / "all/p1.nii.gz", tmp_path / "all/p1.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "all/p1.nii.gz")
    with pytest.raises(DataError, match="its own labels"):
        pair_volumes(tmp_path / "all/p1.nii.gz", tmp_path / "link.nii.gz")


# ---- Folders and patterns ----


def kits(root, *extra):
    names = [f"{case}/{what}" for case in ("case_1", "case_2") for what in ("imaging", "segmentation")]
    return files(root / "kits", *names, *extra)


def test_a_folder_for_each_case(tmp_path, capsys):
    root = kits(tmp_path)
    right = {case: (f"{case}/imaging", f"{case}/segmentation") for case in ("case_1", "case_2")}
    assert found(pair_volumes(root, root), root) == right
    output = capsys.readouterr().out
    assert "by name: case_1/imaging.nii.gz with segmentation.nii.gz" in output
    assert [pair.labels for pair in pair_volumes(root, None)] == [None, None]
    images, labels = root / "*/imaging.nii.gz", root / "*/segmentation.nii.gz"
    assert found(pair_volumes(images, labels), root) == right


@pytest.mark.parametrize(
    "image, labels", [("ct", "seg"), ("volume", "label"), ("image", "mask"), ("x", "gt")]
)
def test_other_names_in_the_folders_of_cases(tmp_path, image, labels):
    root = files(
        tmp_path / "set", *(f"{c}/{c}_{what}.NII.GZ" for c in ("p1", "p2") for what in (image, labels))
    )
    pairs = pair_volumes(root, root)
    assert [(pair.case, pair.image.name, pair.labels.name) for pair in pairs] == [
        (case, f"{case}_{image}.NII.GZ", f"{case}_{labels}.NII.GZ") for case in ("p1", "p2")
    ]


def test_a_case_without_labels_is_for_pretraining_and_of_two_images_it_is_asked_whose_they_are(
    tmp_path, capsys
):
    root = kits(tmp_path, "case_3/imaging")
    pairs = found(pair_volumes(root, root), root)
    assert pairs["case_3"] == ("case_3/imaging", None)
    assert "paired 2 of 3" in capsys.readouterr().out
    files(root, "case_3/segmentation_v2")
    assert found(pair_volumes(root, root), root) == pairs
    assert "labels without an image (left out): 1: case_3/segmentation_v2.nii.gz" in capsys.readouterr().out
    files(root, "case_4/arterial", "case_4/venous")
    assert {"case_4_arterial", "case_4_venous"} <= {*found(pair_volumes(root, root), root)}
    files(root, "case_4/segmentation")
    with pytest.raises(DataError, match="case_4/segmentation.nii.gz: could be the labels of case_4/arterial"):
        pair_volumes(root, root)


def test_labels_in_a_folder_belong_to_the_only_image_there(tmp_path):
    root = files(tmp_path / "set", "p1/abc", "p1/seg", "p2/def", "p2/p2_gt")
    pairs = found(pair_volumes(root, root), root)
    assert pairs == {"p1_abc": ("p1/abc", "p1/seg"), "p2_def": ("p2/def", "p2/p2_gt")}


def test_the_name_of_a_folder_inside_a_word_is_part_of_the_word(tmp_path):
    root = files(tmp_path / "set", *(f"{c}/{what}" for c in "ag" for what in ("imaging", "segmentation")))
    assert found(pair_volumes(root, root), root)["a"] == ("a/imaging", "a/segmentation")


def test_several_images_in_the_folder_of_a_case_are_asked_about(tmp_path):
    root = files(tmp_path / "brats", *(f"{c}/{c}_{what}" for c in "ab" for what in ("t1", "t2", "seg")))
    with pytest.raises(DataError, match=r"a/a_seg.nii.gz: could be the labels of a/a_t1.* and a/a_t2"):
        pair_volumes(root, root)
    pairs = found(pair_volumes(root / "*/*_t2.nii.gz", root / "*/*_seg.nii.gz"), root)
    assert pairs == {case: (f"{case}/{case}_t2", f"{case}/{case}_seg") for case in "ab"}


def test_a_pattern_names_cases_by_what_differs(tmp_path):
    files(tmp_path, "A/1/ct", "A/2/ct", "B/1/ct", "one/9/ct")
    assert [*found(pair_volumes(tmp_path / "[AB]/*/ct.nii.gz", None), tmp_path)] == ["A_1", "A_2", "B_1"]
    assert [*found(pair_volumes(tmp_path / "one/*/ct.nii.gz", None), tmp_path)] == ["9"]
    assert [*found(pair_volumes(tmp_path / "A/*/*.nii*", None), tmp_path)] == ["1", "2"]
    names = [*found(pair_volumes(f"{tmp_path}/**/ct.nii.gz", None), tmp_path)]
    assert len({*names}) == 4
    with pytest.raises(DataError, match="no volume .* is called so"):
        pair_volumes(tmp_path / "*/scan.nii.gz", None)


def test_hidden_files_are_no_volumes_and_suffixes_have_any_case(tmp_path):
    files(tmp_path, "images/._a.nii.gz", "images/a.NII.GZ", "images/b.Nii", "images/notes.txt")
    assert [*found(pair_volumes(tmp_path / "images", None), tmp_path)] == ["a", "b"]


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    root = files(tmp_path / "cts", "a", "b", "more/c", "more/deep/d", "more/labels/d")
    for name in ("e.nhdr", "f.MGZ", "more/damaged.dcm", "more/1.png", "notes.md"):
        put(root / name, b"")
    assert [*found(pair_volumes(root, None), root)] == ["a", "b", "more_c", "more_deep_d"]
    output = capsys.readouterr().out
    assert "left out: volumes of other kinds, or damaged: 3: e.nhdr, f.MGZ, more/damaged.dcm\n" in output
    assert "masks by their names: 1: more/labels/d.nii.gz\n" in output
    assert "slices, which this command does not take: 1: more/1.png\n" in output


@pytest.mark.parametrize(
    "names, cases",
    [
        (["p1/day1/ct", "p2/day1/ct"], ["p1_day1", "p2_day1"]),
        (["p1/ct", "p2/ct", "p2/day2/ct"], ["p1", "p2", "p2_day2"]),
        (["patient1/patient1_frame1", "patient1/patient1_frame2"], ["patient1_frame1", "patient1_frame2"]),
        (["a/x", "b/x"], ["a", "b"]),
        (["a/x", "b/x", "c"], ["a_x", "b_x", "c"]),
        (["arterial/patient3", "venous/patient3"], ["arterial_patient3", "venous_patient3"]),
    ],
)
def test_cases_are_called_after_their_paths_without_what_tells_nothing(tmp_path, names, cases):
    root = files(tmp_path / "in", *names)
    assert sorted(found(pair_volumes(root, None), root)) == sorted(cases)


def test_one_name_for_two_cases_is_refused(tmp_path):
    root = files(tmp_path / "in", "p2/ct")
    put(root / "p2.mha", b"")
    with pytest.raises(DataError, match=r"in/p2/ct.nii.gz and .*in/p2.mha would both be the case p2; rename"):
        pair_volumes(root, None)


def test_the_only_labels_of_a_folder_are_printed_with_their_image(tmp_path, capsys):
    files(tmp_path, "a/patient", "b/other")
    [pair] = pair_volumes(tmp_path / "a/patient.nii.gz", tmp_path / "b")
    assert pair.labels.name == "other.nii.gz"
    assert "paired patient.nii.gz with other.nii.gz, the only volume of" in capsys.readouterr().out
