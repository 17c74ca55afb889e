"""prepare/lists.py: cases divided into lists."""

from prepare.lists import split_cases


def test_split_cases():
    for count, sizes in ((2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (40, (24, 8, 8))):
        cases = [f"case{index}" for index in range(count)]
        parts = split_cases(cases)
        assert tuple(map(len, parts.values())) == sizes
        assert sorted(sum(parts.values(), [])) == sorted(cases)
