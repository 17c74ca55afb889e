"""evaluation/features.py: what a probe sees of a map."""

import torch

from evaluation.features import Features, pooled_stages


def test_means_of_maps_are_float32_under_autocast():
    """Of the maps as they are; probes compare what bfloat16 would round away."""
    maps = (1 + 0.01 * torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled_stages(lambda images, stages: {"layer4": maps}, None)
    torch.testing.assert_close(found["layer4 mean"], maps.double().mean((2, 3)).float())
    torch.testing.assert_close(found["layer4 grid"].view(2, 8, 7, 7), maps.float())


def test_kinds_are_put_together_from_what_is_held():
    """Of a part in a file only the columns of one kind are read at a time."""
    generator = torch.Generator().manual_seed(0)
    found = [{"a": torch.randn(n, 3, generator=generator), "b": torch.ones(n, 2)} for n in (4, 1)]
    features = Features(lambda images: found[images])
    kinds = features.apart([features(0), features(1)])
    assert [*kinds] == ["a", "b"] and kinds.finite()
    for name in kinds:
        assert (kinds[name] == torch.cat([part[name] for part in found]).numpy()).all()
    kinds.splits[1][0, 4] = torch.inf
    assert not kinds.finite() and kinds["b"][4, 1] == torch.inf
