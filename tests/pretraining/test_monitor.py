"""pretraining/monitor.py: features as colours."""

import torch

from pretraining.monitor import feature_colors


def test_like_features_have_like_colours():
    """Four kinds of positions, the same in all maps: four colours, whatever rotation the features have."""
    torch.manual_seed(0)
    kinds = torch.randint(0, 4, (3, 6, 5))
    centres = torch.linalg.qr(torch.randn(16, 16))[0][:4] * torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    maps = (centres[kinds] + 0.01 * torch.randn(3, 6, 5, 16)).movedim(-1, 1)
    colors = feature_colors(maps)
    assert colors.shape == (3, 6, 5, 3) and colors.min() >= 0 and colors.max() <= 1
    means = torch.stack([colors[kinds == kind].mean(dim=0) for kind in range(4)])
    assert all(colors[kinds == kind].std(dim=0).max() < 0.02 for kind in range(4))
    assert torch.pdist(means).min() > 0.3
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    turned = feature_colors(torch.einsum("nchw,cd->ndhw", maps, rotation))
    same = [
        ((turned[..., i] - colors[..., i]).abs().max(), (1 - turned[..., i] - colors[..., i]).abs().max())
        for i in range(3)
    ]
    assert all(min(plain, mirrored) < 1e-4 for plain, mirrored in same)
