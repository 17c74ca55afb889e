"""ct/series.py: which files of a DICOM series make a volume, from headers alone."""

import filecmp
import shutil
from functools import partial

import numpy as np
import pytest

from ct import series
from ct.series import TELLING

AXIAL = "1\\0\\0\\0\\1\\0"


def file(folder, z, at="-50\\-60", turned=AXIAL, spacing="0.7\\0.7", **told):
    """(path, header) of a slice at z mm; told: texts of TELLING, by their names with _ for a space."""
    path = folder / f"{len([*folder.iterdir()]):04d}"
    path.write_text(path.name)
    header = {"series": "1.2.3", "patient": "", "frames": 1, "size": (8, 10), "number": path.name}
    header |= {"position": f"{at}\\{z}", "orientation": turned, "spacing": spacing}
    header |= {"acquisition": told.get("acquisition", "")}
    assert {*told} <= {name.replace(" ", "_") for name in TELLING}
    return path, header | {"told": tuple(told.get(name.replace(" ", "_"), "") for name in TELLING)}


def volumes_of(members):
    return series.volumes_of(members, partial(filecmp.cmp, shallow=False))


def heights_of(found):
    """The heights in mm of the slices of each Series, sorted."""
    assert not any(one.failure for one in found), found
    return sorted([round(one.position[2], 3) for one in volume.slices] for volume in found)


def shuffled(members, seed=0):
    return [members[i] for i in np.random.default_rng(seed).permutation(len(members))]


def said(found):
    return [doubt.text for one in found for doubt in one.doubts]


@pytest.mark.parametrize("offset", (0, 2e-6, 0.3, 1.0, -1.0))
@pytest.mark.parametrize(
    "told",
    (
        {"acquisition": "2 1 11"},
        {"acquisition": "2  3"},  # of one it is missing
        {"time": "101213 101258.5 101300"},
        {"time_of_the_content": "101213 101258.5 101300"},
        {"temporal_position": "1 2 3"},
        {"kind_of_image": "ORIGINAL\\PRIMARY\\AXIAL ORIGINAL\\PRIMARY\\AXIAL\\CT_B DERIVED\\PRIMARY\\AXIAL"},
        {"acquisition": "1 1 1", "kernel": "B30f B70f Br40"},
    ),
)
@pytest.mark.parametrize("count", (2, 3))
def test_acquisitions_of_one_range_come_apart(tmp_path, offset, told, count):
    """At the same places, micrometres off, and in between, where no place occurs twice."""
    heights = [[2.0 * i + phase * offset * 2 / count for i in range(7)] for phase in range(count)]
    texts = {name: text.split(" ") for name, text in told.items()}
    members = [
        file(tmp_path, z, **{name: each[phase] for name, each in texts.items()})
        for phase in range(count)
        for z in heights[phase]
    ]
    found = volumes_of(shuffled(members))
    assert heights_of(found) == sorted(np.round(heights, 3).tolist()) and not said(found)
    assert len({one.uid for one in found}) == count
    assert {one.uid for one in volumes_of(shuffled(members))} == {one.uid for one in found}
    assert all(len({one.told for one in volume.slices}) == 1 for volume in found)


@pytest.mark.parametrize("key", ("acquisition", "time", "time_of_the_content"))
@pytest.mark.parametrize(
    "second", ([0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11], [10, 8, 6, 4, 2, 0], [-4, -2, 0, 2, 4])
)
def test_a_number_or_time_for_each_slice_tells_acquisitions_apart_too(tmp_path, key, second):
    first = [0, 2, 4, 6, 8, 10]
    members = [file(tmp_path, z, **{key: str(100 + i)}) for i, z in enumerate(first + second)]
    assert heights_of(volumes_of(shuffled(members))) == sorted([first, sorted(second)])


@pytest.mark.parametrize(
    "second",
    (
        [4, 6, 8],
        [1, 3, 5],
        [3, 5, 9, 11],  # a slice is missing
        [*range(0, 12, 2), 16, 18],
        [*range(-10, 30, 2)],
        [8, 10, 12, 14, 16, 18],
    ),
)
def test_acquisitions_of_other_ranges_and_with_gaps(tmp_path, second):
    first = [*range(0, 22, 2)]
    members = [file(tmp_path, z, acquisition="1") for z in first]
    members += [file(tmp_path, z, acquisition="2") for z in second]
    assert heights_of(volumes_of(shuffled(members))) == sorted([first, second])


@pytest.mark.parametrize(
    "steps",
    (
        [[z] for z in range(0, 24, 2)],
        [[z] for z in range(24, 0, -2)],
        [[0, 2, 4, 6, 8], [10, 12, 14, 16]],
        [[10, 12, 14, 16], [0, 2, 4, 6, 8]],
        [[0, 2, 4, 6, 8], [9, 11, 13, 15]],  # one ends where the next begins, half a slice on
        [[18, 20, 22], [12, 14, 16], [6, 8, 10], [0, 2, 4]],
        [[8, 10, 12, 14], [16, 18, 20], [0, 2, 4, 6]],
        [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],  # each step fills its own gaps
    ),
)
@pytest.mark.parametrize("key", ("acquisition", "time", "time_of_the_content"))
def test_what_was_scanned_in_steps_is_one_volume(tmp_path, steps, key):
    members = [file(tmp_path, z, **{key: str(number)}) for number, step in enumerate(steps, 8) for z in step]
    assert heights_of(volumes_of(shuffled(members))) == [sorted(sum(steps, []))]


def test_steps_that_share_their_last_place_are_one_volume(tmp_path):
    members = [file(tmp_path, z, acquisition="1") for z in (0, 2, 4, 6)]
    members += [file(tmp_path, z, acquisition="2") for z in (6, 8, 10)]
    found = volumes_of(members)
    assert heights_of(found) == [[0, 2, 4, 6, 8, 10]] and "1 files lie where others do" in said(found)[0]
    assert found[0].slices[3].told[0] == "1"


def test_two_acquisitions_in_steps_with_two_kernels(tmp_path):
    """Numbers tell the acquisitions apart, each of three steps, and kernels the pictures of each."""
    heights = [[*range(6)], [*range(6, 12)], [*range(12, 18)]]
    members = [
        file(tmp_path, z, acquisition=str(3 * phase + number), kernel=kernel)
        for phase in range(2)
        for number, step in enumerate(heights)
        for z in step
        for kernel in ("B30f", "B70f")
    ]
    found = volumes_of(shuffled(members))
    assert heights_of(found) == [[*range(18)]] * 4 and len({one.uid for one in found}) == 4


def test_pictures_that_time_the_contrast_medium_are_apart(tmp_path):
    members = [file(tmp_path, 6, acquisition="2", time=str(number)) for number in range(10)]
    members += [file(tmp_path, z, acquisition="3", time="100") for z in range(0, 20, 2)]
    found = volumes_of(shuffled(members))
    assert heights_of(found) == [[*range(0, 20, 2)], [6] * 10] and not said(found)
    assert all(len({one.told[0] for one in volume.slices}) == 1 for volume in found)


@pytest.mark.parametrize("offset", (0, 2e-6, 0.03, 0.3))
@pytest.mark.parametrize("second", (range(0, 12, 2), range(4, 10, 2)))
def test_what_nothing_tells_apart_is_refused(tmp_path, offset, second):
    members = [file(tmp_path, z, acquisition="1", time="1") for z in range(0, 12, 2)]
    members += [file(tmp_path, z + offset, acquisition="1", time="1") for z in second]
    (one,) = volumes_of(shuffled(members))
    assert "acquisitions are mixed" in one.failure and "dcm2niix" in one.failure and "\n" not in one.failure


def test_copies_of_files_are_left_out(tmp_path):
    members = [file(tmp_path, z, acquisition=number) for number in "12" for z in range(0, 10, 2)]
    for path, header in [*members]:
        copy = shutil.copy(path, path.with_suffix(".copy"))
        members.append((copy, header))
    found = volumes_of(shuffled(members))
    assert heights_of(found) == [[0, 2, 4, 6, 8]] * 2 and all(
        "10 files are copies" in text for text in said(found)
    )


@pytest.mark.parametrize("middle", (0.0005, 0.0015, 0.9995, 1e-9, -0.0005))
def test_directions_and_distances_that_wobble(tmp_path, middle):
    """Around where rounding would part them, far from the origin; along the normal they have in common."""
    rng, members = np.random.default_rng(0), []
    for number in range(12):
        sine = middle + rng.choice([-2e-5, 2e-5])
        cosine = np.sqrt(1 - sine**2)
        turned = f"{cosine:.6f}\\{sine:.6f}\\0\\{-sine:.6f}\\{cosine:.6f}\\{rng.choice([0, 1e-5]):.6f}"
        spacing = f"{rng.choice([0.70312, 0.70313, 0.7031349, 0.7031351])}"
        members.append(file(tmp_path, 3 * number - 1500, "-250\\-900", turned, f"{spacing}\\{spacing}"))
    found = volumes_of(shuffled(members))
    assert heights_of(found) == [[3 * number - 1500 for number in range(12)]] and not said(found)
    assert len({(one.turned, one.spacing) for one in found[0].slices}) == 1


def test_other_directions_and_distances_of_pixels_are_apart(tmp_path):
    cosine, sine = np.cos(np.radians(1)), np.sin(np.radians(1))
    tilted = f"1\\0\\0\\0\\{cosine:.6f}\\{sine:.6f}"
    members = [file(tmp_path, z, turned=turned) for turned in (AXIAL, tilted) for z in range(0, 10, 2)]
    members += [file(tmp_path, z, spacing="0.7\\0.702") for z in range(0, 10, 2)]
    assert heights_of(volumes_of(shuffled(members))) == [[0, 2, 4, 6, 8]] * 3
