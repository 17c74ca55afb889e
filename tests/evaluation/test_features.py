"""evaluation/features.py: what a probe sees of a map."""

import torch

from evaluation.features import pooled_stages


def test_means_of_maps_are_float32_under_autocast():
    """Of the maps as they are; probes compare what bfloat16 would round away."""
    maps = (1 + 0.01 * torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled_stages(lambda images, stages: {"layer4": maps}, None)
    torch.testing.assert_close(found["layer4 mean"], maps.double().mean((2, 3)).float())
    torch.testing.assert_close(found["layer4 grid"].view(2, 8, 7, 7), maps.float())
