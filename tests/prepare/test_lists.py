"""prepare/lists.py: cases divided into lists."""

from prepare.lists import read_split, split_cases


def test_cases_that_a_split_leaves_out_are_said(tmp_path, capsys):
    (tmp_path / "split.json").write_text('{"train": ["a"], "test": ["b"]}')
    read_split(str(tmp_path / "split.json"), ["a", "b", "c"])
    assert capsys.readouterr().out.endswith("split.json (for pretraining only): 1: c\n")


def test_split_cases():
    for count, sizes in ((2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (40, (24, 8, 8))):
        cases = [f"case{index}" for index in range(count)]
        parts = split_cases(cases)
        assert tuple(map(len, parts.values())) == sizes
        assert sorted(sum(parts.values(), [])) == sorted(cases)
