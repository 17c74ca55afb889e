"""ct/patients.py: whose a case is."""

import re

import pytest

from ct.layout import case_of
from ct.patients import in_words, patients_of
from ct.slices import DataError


def whose(*places, pattern=None, known=None):
    """The patients with several cases, as {patient: [cases]}; a case is called by its place."""
    found, _ = patients_of({place: place for place in places}, pattern and re.compile(pattern), known)
    patients = {}
    for case, patient in found.items():
        patients.setdefault(patient, []).append(case)
    return patients


def grid(folders, names):
    return [f"{folder}/{name}" for folder in folders for name in names]


@pytest.mark.parametrize(
    "places, count",
    [
        (grid(["patient03", "patient04"], ["arterial", "venous"]), 2),
        (grid(["anna", "bert", "carla"], ["arterial", "venous"]), 3),
        (grid(["p1", "p2"], ["scan1", "scan2", "scan3"]), 2),
        (grid(["arterial", "venous"], ["patient03", "patient04", "patient05"]), 3),
        (grid(["pre", "post"], ["c1", "c2"]), 2),
        (grid(["day1", "day2"], ["x7", "x8", "x9"]), 3),
        (["p12/2019-03-01", "p12/2020-05-04", "p13/2018-01-01"], 1),
        (["images/p1/a", "images/p1/b", "images/p2/a"], 1),
        (["siteA/p1/a", "siteA/p1/b", "siteB/p2/a", "siteB/p2/b"], 2),
        (["IM003_patient05", "IM004_patient05", "IM001_patient06"], 1),
        (["sub-01/ses-1/ct", "sub-01/ses-2/ct", "sub-02/ses-1/ct"], 1),
        (["p2", "p2/day2", "p1"], 1),
    ],
)
def test_several_scans_of_a_patient(places, count):
    found = whose(*places)
    assert len(found) == count and {len(cases) for cases in found.values()} <= {2, 3}


@pytest.mark.parametrize(
    "places",
    [
        [f"img{number:04d}" for number in range(1, 30)],  # BTCV
        [f"case_{number:05d}/imaging" for number in range(30)],  # KiTS
        [f"img_dir/train/img{number}" for number in range(5)],  # mmseg
        ["imagesTr/amos_0001", "imagesTr/amos_0002", "imagesVa/amos_0003", "imagesTs/amos_0004"],  # AMOS
        [f"Task03_Liver/imagesTr/liver_{n}" for n in range(3)] + ["Task09_Spleen/imagesTr/spleen_2"],  # MSD
        [f"subset{n % 2}/{n}" for n in range(8)],  # LUNA16
        [f"CT/{n}/DICOM_anon" for n in range(4)],  # CHAOS
        [f"s{n:04d}/ct" for n in range(4)],  # TotalSegmentator
        ["hospitalA/p1", "hospitalA/p2", "hospitalB/p3"],
        ["tumor/101", "tumor/102", "normal/7"],
        grid(["a1", "b2"], [])[:0] + [f"x{n // 30}/{n}" for n in range(90)],  # thirty each
        ["train/p1", "train/p2", "test/p3"],
    ],
)
def test_published_layouts_have_a_patient_for_each_case(places):
    assert whose(*places) == {}


def test_a_header_says_more_than_a_folder_unless_it_says_the_same_of_all(capsys):
    places = ["p1/a", "p1/b", "p2/a", "p2/b"]
    assert whose(*places, known=dict(zip(places, "xyxz"))) == {"x": ["p1/a", "p2/a"]}
    assert len(whose(*places, known=dict.fromkeys(places, "anonymous"))) == 2
    assert "one PatientID" in capsys.readouterr().out
    assert whose("p1/a", "p1/b", "p2/a", "p3/a", known={"p1/b": "x", "p2/a": "y"}) == {"x": ["p1/a", "p1/b"]}


def test_a_pattern_decides_by_its_first_group_or_the_whole_match():
    places = ["P12_2019-03-01", "P12_2020-01-01", "P13_2019-01-01"]
    assert whose(*places) == {}
    for pattern, patient in (("^[^_]+", "P12"), (r"P(\d+)", "12")):
        assert whose(*places, pattern=pattern) == {patient: places[:2]}
    assert whose("p1/a", "p1/b", pattern=".*") == {}
    with pytest.raises(DataError, match="--patient Q: is not in the name of any case, such as P12"):
        whose(*places, pattern="Q")


def test_an_example_is_shown():
    places = {"p3_a": "p3/a", "p3_b": "p3/b", "p4_a": "p4/a"}
    text = in_words(places, *patients_of(places))
    assert text.startswith("case: p3_a, of patient p3 (2 scans, by the folder; --patient") and text.endswith(
        ": 2"
    )
    assert in_words({"a": "a"}, {}, "").startswith("case: a; each is a patient of its own (--patient")


def test_a_last_number_that_is_the_patients_is_no_slice():
    assert case_of("IM003_patient05.png") == case_of("train/IM004_patient05.png") == "patient05"
    assert case_of("patient05_slice003.png") == "patient05_slice" and case_of("x/IM1_patient05.png") == "x"
