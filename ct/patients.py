"""Of which patient a case is, for splits, folds and shares of labels are by patient: of somebody who was
scanned twice no scan is for training while another one is in the test.

In this order: a pattern of the user's; the PatientID of DICOM, hashed; a name that says it (patient05,
sub-01); the folders in which cases lie. What all cases share, such as a folder or an anonymous ID, is no
patient.
"""

import re
from collections import Counter, defaultdict

from ct.layout import SPLIT_FOLDERS, case_of, without_suffix
from ct.listing import IMAGE_WORDS, LABEL_WORDS, PATIENT, words_in
from ct.slices import DataError
from engine.config import one_line

OPTION = "--patient REGEX says otherwise"
MOST_SCANS = 10  # of a patient, in the mean; larger folders are those of hospitals and the like
SCAN_WORDS = {"scan", "series", "study", "session", "ses", "visit", "day", "phase", "time", "tp", "t"}
COLLECTION = re.compile(
    r"(site|hospital|center|centre|clinic|cohort|batch|part|fold|(sub|data)?set|task|group|scanner|vendor)"
    r"s?(?![a-z]{2})",
    re.IGNORECASE,
)


def patients_of(places, pattern=None, known=None):
    """The patients of cases that share theirs with another case, {case: patient}, and in words how they were
    found.

    places   {case: where it lies, "folder/name"}
    pattern  a compiled regular expression that is searched in a place: its first group, or the whole match
    known    {case: what a header says}
    """
    if pattern:
        found = {case: matched(pattern, place) for case, place in places.items()}
        if not any(found.values()):
            raise nowhere(pattern, next(iter(places.values())))
        return shared(found), "by --patient"
    known = {case: known[case] for case in places if (known or {}).get(case)}
    if len(known) > 1 and len({*known.values()}) == 1:
        print(f"note: all {len(known)} series have one PatientID, of a single patient or of none: left aside")
        known = {}
    found, how = {}, "by PatientID"
    if len(known) < len(places):
        named = {case: matched(PATIENT, place) for case, place in places.items()}
        found, how = (named, "by the name") if len({*named.values()}) > 1 else by_folder(places)
    ids = defaultdict(set)
    for case, patient in known.items():
        ids[found.get(case)].add(patient)
    for case, patient in found.items():  # beside the series of a single patient
        found[case] = min(ids[patient]) if patient and len(ids[patient]) == 1 else patient
    return shared(found | known), how


def patients_of_slices(names, properties, pattern=None):
    """The same of named slices, also {slice without suffix: patient} where a case, by its name, has slices of
    several."""
    if properties.patients and pattern is None:
        return properties.patients, "as the set says"
    if pattern is None:
        return patients_of({case: case for case in map(case_of, names)})
    cases = defaultdict(list)
    for name in map(without_suffix, names):
        cases[case_of(name)].append((name, matched(pattern, name)))
    if not any(patient for own in cases.values() for _, patient in own):
        raise nowhere(pattern, names[0])
    alone = {case: own[0][1] for case, own in cases.items() if len({patient for _, patient in own}) == 1}
    mixed = {name: patient for case, own in cases.items() if case not in alone for name, patient in own}
    return shared(alone) | {name: patient for name, patient in mixed.items() if patient}, "by --patient"


def in_words(cases, patients, how, kind="case"):
    """One example of what is taken for a case and for a patient, as a line."""
    counts = Counter(patients.get(case, case) for case in cases)
    shown = next((case for case in cases if counts[patients.get(case, case)] > 1), None)
    if shown is None:
        return f"{kind}: {one_line(next(iter(cases)))}; each is a patient of its own ({OPTION})"
    patient = patients.get(shown, shown)
    about = f"{counts[patient]} scans, {how}; {OPTION}"
    return f"{kind}: {one_line(shown)}, of patient {one_line(patient)} ({about}); patients: {len(counts)}"


def nowhere(pattern, example):
    return DataError(
        f"--patient {pattern.pattern}: is not in the name of any case, such as {one_line(example)}"
    )


def shared(patients):
    """Without the patients of a single case."""
    counts = Counter(filter(None, patients.values()))
    return {case: patient for case, patient in patients.items() if counts[patient] > 1}


def matched(pattern, place):
    found = pattern.search(place)
    return found and ((pattern.groups and found[1]) or found[0]) or None


# ---- Folders -------------------------------------------------------------------------------------


def by_folder(places):
    """{case: patient}, and how: patient3/venous and patient3/arterial are of patient3; so are venous/patient3
    and arterial/patient3, of names that recur in folders of which there are fewer, or that hold no number."""
    parts = {case: telling(place) for case, place in places.items()}
    for end in (0, -1):
        while len({own[end] for own in parts.values()}) == 1 and all(len(own) > 1 for own in parts.values()):
            parts = {case: own[1:] if end == 0 else own[:-1] for case, own in parts.items()}
    deep = [own for own in parts.values() if len(own) > 1]
    folders, names = {own[0] for own in deep}, {own[-1] for own in deep}
    recurring = len({(own[0], own[-1]) for own in deep}) > len(names)
    of_scans = [all(map(is_of_scan, level)) for level in (folders, names)]
    if recurring and (len(names) > len(folders) if of_scans[0] == of_scans[1] else of_scans[0]):
        return {case: own[-1] for case, own in parts.items()}, "by the name, which recurs in other folders"
    if not recurring and of_scans == [True, False]:
        return {}, ""  # tumor/101, normal/7: folders of kinds
    for level in range(1, max(map(len, deep), default=0)):
        found = {case: "/".join(own[:level]) for case, own in parts.items()}
        if len(found) <= MOST_SCANS * len({*found.values()}):
            return found, "by the folder"
    return {}, ""


def telling(place):
    """The parts of a place that can name a patient or a scan."""
    parts = place.split("/")
    told = [
        part
        for part in parts
        if part.lower() not in SPLIT_FOLDERS
        and not {*words_in(part)} <= IMAGE_WORDS | LABEL_WORDS
        and not COLLECTION.match(part)
    ]
    return told or parts[-1:]


def is_of_scan(part):
    """Whether a name is that of a scan rather than of a patient: a word, day 2, a date."""
    letters = re.sub(r"[^a-z]", "", part.lower())
    return (
        not re.search(r"\d", part) or letters in SCAN_WORDS or bool(re.search(r"(19|20)\d\d[-_.]?\d\d", part))
    )
