"""spark.py: what is hidden is never seen, norms count what is visible, otherwise it is the plain ResNet."""

import copy

import pytest
import torch
import torch.nn.functional as F
from every_method import small

from losses import patch_reconstruction
from models import LAYERS, Encoder, SplitBatchNorm2d
from spark import (
    Decoder,
    SparK,
    Visible,
    VisibleBatchNorm2d,
    only_visible,
    see_only_what_is_visible,
)

SIZE, CELLS = 96, 3  # px of a view, and its cells a side with an output stride of 32


def images(n=4, channels=1, seed=0, height=SIZE, width=SIZE):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def spark_with_norms(stride=32, **options):
    """A SparK whose norms have affine parameters of their own, so that a shift shows."""
    torch.manual_seed(0)
    model = SparK(Encoder("tiny", output_stride=stride), hidden=16, **options)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5)
    return model


def visible_of(model, view):
    cells = model.targets([view]).visible
    return Visible(cells, view.shape[2] // model.cell, view.shape[3] // model.cell)


def hidden_pixels(seen, shape):
    """Whether a pixel of maps (n, C, h, w) lies in a hidden cell, by a loop over cells."""
    n, _, h, w = shape
    hidden = torch.ones(n, h, w, dtype=torch.bool)
    rows, columns = h // seen.grid[0], w // seen.grid[1]
    for image, cells in enumerate(seen.cells.tolist()):
        for cell in cells:
            y, x = cell // seen.grid[1] * rows, cell % seen.grid[1] * columns
            hidden[image, y : y + rows, x : x + columns] = False
    return hidden


def encoded(model, view, seen):
    with only_visible(model, seen):
        return model.query.encoder(seen.only(view), LAYERS)


# ---- What is hidden ----


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("training", [True, False])
def test_values_under_the_mask_never_reach_the_output(stride, training):
    """Whatever is there, NaN too: the same bits in all maps, the prediction and the running statistics."""
    view = images()
    results = []
    for filling in (None, 0.0, 1e6, torch.nan, torch.inf):
        model = spark_with_norms(stride).train(training)
        seen = visible_of(model, view)
        changed = view.clone()
        if filling is not None:
            changed[hidden_pixels(seen, view.shape)[:, None]] = filling
            assert filling == 0 or (changed != view).any()
        maps = encoded(model, changed, seen)
        with only_visible(model, seen):
            prediction = model.decoder(maps, seen)
        results.append([*maps.values(), prediction, *model.buffers()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("stride", [32, 16])
def test_maps_are_0_in_hidden_cells_and_not_in_visible_ones(stride):
    model, view = spark_with_norms(stride), images()
    seen = visible_of(model, view)
    maps = encoded(model, view, seen)
    sides = {name: SIZE // min(s, stride) for name, s in zip(LAYERS, (4, 8, 16, 32))}
    for name, features in maps.items():
        assert features.shape[2:] == (sides[name], sides[name])
        hidden = hidden_pixels(seen, features.shape)
        assert not features.movedim(1, 3)[hidden].any()
        assert features.movedim(1, 3)[~hidden].any(dim=1).all()


def test_gradients_come_from_visible_values_only():
    model, view = spark_with_norms(), images().requires_grad_()
    seen = visible_of(model, view)
    sum(features.sum() for features in encoded(model, view, seen).values()).backward()
    hidden = hidden_pixels(seen, view.shape)
    assert not view.grad[:, 0][hidden].any() and view.grad[:, 0][~hidden].any()


def test_the_loss_depends_on_hidden_values_as_the_target_only():
    model, view = spark_with_norms(), images()
    targets = model.targets([view])
    seen = Visible(targets.visible, CELLS, CELLS)
    hidden = hidden_pixels(seen, view.shape)[:, None]
    maps = encoded(copy.deepcopy(model), view, seen)
    with only_visible(model, seen):
        prediction = model.decoder(maps, seen)
    other = torch.where(hidden, images(seed=1), view)
    expected = patch_reconstruction(prediction, other, seen.hidden())
    terms = copy.deepcopy(model)([other], targets=targets)
    torch.testing.assert_close(terms["loss"], expected)


# ---- Norms and pooling ----


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_statistics_count_visible_positions_only(split, layout):
    """Against those of the values at visible positions, gathered one by one."""
    torch.manual_seed(0)
    norm = VisibleBatchNorm2d(5)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.uniform_(-1, 1)
    norm.split = split
    x = (2 * images(4, 5, height=12, width=8) + 3).to(memory_format=layout)
    seen = Visible(torch.tensor([[0, 3], [1, 2], [4, 5], [0, 5]]), 3, 2)
    norm.visible = seen
    y = norm(x)
    hidden = hidden_pixels(seen, x.shape)
    means, variances = [], []
    for part in range(0, 4, split or 4):
        rows = slice(part, part + (split or 4))
        values = x[rows].movedim(1, 3)[~hidden[rows]]  # (positions, 5)
        assert len(values) == (split or 4) * 2 * 16
        means.append(values.mean(0))
        variances.append(values.var(0))
        normed = (values - means[-1]) / (values.var(0, correction=0) + norm.eps).sqrt()
        expected = normed * norm.weight + norm.bias
        torch.testing.assert_close(y[rows].movedim(1, 3)[~hidden[rows]], expected, atol=1e-5, rtol=1e-5)
    assert not y.movedim(1, 3)[hidden].any()
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert norm.num_batches_tracked == 1


def test_every_norm_of_the_encoder_counts_visible_positions_only():
    """All of them, in the trunk and before the decoder: watched from outside."""
    model, view = spark_with_norms(), images()
    seen, watched = visible_of(model, view), []

    def watch(norm, inputs, _):
        (x,) = inputs
        values = x.detach().movedim(1, 3)[~hidden_pixels(seen, x.shape)]
        before = norm.running_mean_before
        torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * values.mean(0))
        watched.append(norm)

    norms = [m for m in model.modules() if isinstance(m, VisibleBatchNorm2d)]
    for norm in norms:
        norm.running_mean_before = norm.running_mean.clone()
        norm.register_forward_hook(watch)
    model([view], targets=model.targets([view]))
    assert {id(norm) for norm in watched} == {id(norm) for norm in norms}
    assert len(norms) == len([m for m in Encoder("tiny").modules() if isinstance(m, SplitBatchNorm2d)]) + 4


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("training", [True, False])
def test_without_a_mask_it_is_the_plain_resnet(stride, training):
    """The same bits; names and shapes of the weights, too."""
    torch.manual_seed(0)
    plain = Encoder("tiny", output_stride=stride).train(training)
    ours = copy.deepcopy(plain)
    see_only_what_is_visible(ours)
    view = images()
    expected, found = plain(view, LAYERS), ours(view, LAYERS)
    assert all(torch.equal(found[name], expected[name]) for name in LAYERS)
    state, same = plain.state_dict(), ours.state_dict()
    assert list(state) == list(same) and all(torch.equal(same[name], state[name]) for name in state)


@pytest.mark.parametrize("stride", [32, 16])
def test_with_everything_visible_it_is_the_plain_resnet(stride):
    """A mask ratio of 0, through the same code as any other."""
    torch.manual_seed(0)
    plain = Encoder("tiny", output_stride=stride).double()
    model = SparK(copy.deepcopy(plain), mask=0.0, hidden=16).double()
    view = images().double()
    seen = visible_of(model, view)
    assert not seen.hidden().any()
    expected, found = plain(view, LAYERS), encoded(model, view, seen)
    for name in LAYERS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


def test_pooling_takes_nothing_into_hidden_cells():
    encoder = Encoder("tiny")
    see_only_what_is_visible(encoder)
    seen = Visible(torch.tensor([[0]]), 1, 2)
    encoder.maxpool.visible = seen
    x = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    pooled = encoder.maxpool(seen.only(x))
    expected = F.max_pool2d(seen.only(x), 3, 2, 1)
    assert expected[..., 4].any()  # what an ordinary one would carry over the edge
    assert torch.equal(pooled[..., :4], expected[..., :4]) and not pooled[..., 4:].any()


def test_outside_a_step_nothing_is_hidden():
    """Also after a step that has failed: the monitor looks at whole slices."""
    model, view = spark_with_norms(), images()
    model([view])
    with pytest.raises(ZeroDivisionError), only_visible(model, visible_of(model, view)):
        raise ZeroDivisionError
    assert all(getattr(m, "visible", None) is None for m in model.modules())
    model.eval()
    assert model.query.encoder(view)["layer4"].any(dim=1).all()


# ---- The mask ----


@pytest.mark.parametrize(("mask", "visible"), [(0.6, 4), (0.5, 4), (0.75, 2), (0.99, 1), (0.01, 8)])
def test_so_many_cells_are_hidden(mask, visible):
    """Of nine; one or more are visible, and one or more hidden."""
    model = spark_with_norms(mask=mask)
    cells = model.targets([images(16)]).visible
    assert cells.shape == (16, visible)
    assert all(len(set(row)) == visible and row == sorted(row) for row in cells.tolist())
    assert cells.min() >= 0 and cells.max() < 9
    seen = Visible(cells, CELLS, CELLS)
    assert torch.equal(seen.hidden().sum(dim=(1, 2)), torch.full((16,), 9 - visible))


def test_the_mask_is_drawn_anew_for_each_step_and_sample():
    model, view = spark_with_norms(), images(8)
    first = model.targets([view]).visible
    assert torch.equal(model.targets([view]).visible, first)
    assert len({tuple(row) for row in first.tolist()}) > 4
    model.after_step(None)
    assert not torch.equal(model.targets([view]).visible, first)
    model.step = 0
    assert torch.equal(model.targets([view]).visible, first)
    model.seed = 1
    assert not torch.equal(model.targets([view]).visible, first)
    counts = torch.zeros(9)
    for model.step in range(200):
        counts += model.targets([view]).visible.flatten().bincount(minlength=9)
    assert (counts / counts.sum() * 9 - 1).abs().max() < 0.15


@pytest.mark.parametrize("world", [2, 4])
def test_the_mask_of_a_sample_does_not_depend_on_the_processes(world, monkeypatch):
    model, view = spark_with_norms(), images(8)
    whole = model.targets([view]).visible
    share = 8 // world
    monkeypatch.setattr("spark.world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr("spark.own_rows", lambda n, rank=rank: slice(rank * n, rank * n + n))
        mine = slice(rank * share, (rank + 1) * share)
        assert torch.equal(model.targets([view[mine]]).visible, whole[mine])


def test_a_view_need_not_be_square():
    model, view = spark_with_norms(), images(4, height=64, width=128)
    seen = visible_of(model, view)
    assert seen.hidden().shape == (4, 2, 4)
    assert torch.equal(
        seen.hidden().repeat_interleave(32, 1).repeat_interleave(32, 2), hidden_pixels(seen, view.shape)
    )
    terms = model([view])
    assert terms["loss"].isfinite()


# ---- The decoder ----


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_prediction_has_the_size_of_the_view(stride, channels):
    torch.manual_seed(0)
    model = SparK(Encoder("tiny", channels, output_stride=stride), hidden=16)
    view = images(2, channels)
    seen = visible_of(model, view)
    maps = encoded(model, view, seen)
    with only_visible(model, seen):
        assert model.decoder(maps, seen).shape == view.shape
    assert model([view])["loss"].isfinite()


def test_hidden_positions_get_the_learnt_vector():
    model, view = spark_with_norms(), images()
    seen = visible_of(model, view)
    maps = encoded(model, view, seen)
    with only_visible(model, seen):
        for name, features in maps.items():
            filled = model.decoder.filled(name, features, seen).movedim(1, 3)
            hidden = hidden_pixels(seen, features.shape)
            token = model.decoder.tokens[name]
            assert torch.equal(filled[hidden], token.expand(int(hidden.sum()), -1))
            assert (filled[~hidden] != token).any(dim=1).all()


def test_the_decoder_is_light():
    """Of a ResNet-50, far fewer parameters than the encoder."""
    with torch.device("meta"):
        encoder = Encoder("resnet50")
        decoder = Decoder(encoder, 128)
    count = [sum(p.numel() for p in m.parameters()) for m in (encoder, decoder)]
    assert count[1] < 0.2 * count[0]


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="local.weight: masked reconstruction sees one view"):
        small("spark", local={})
    for trunk, options in ((Encoder("tiny"), {"method": "zca"}), (Encoder("tiny", whitening="zca"), None)):
        with pytest.raises(ValueError, match="decorrelation.method: whitening would count the hidden"):
            SparK(trunk, decorrelation=options)


def test_it_learns_to_fill_in_what_is_hidden():
    """Stripes, whose hidden parts follow from the visible ones: far better than the mean of each cell."""
    torch.manual_seed(0)
    model = SparK(Encoder("tiny"), hidden=32, bn_split=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.arange(64) * 2 * torch.pi / 16
    losses = []
    for step in range(60):
        phase = torch.rand(8, 1, generator=torch.Generator().manual_seed(step)) * 2 * torch.pi
        view = torch.sin(x + phase)[:, None, None].expand(8, 1, 64, 64).contiguous()
        loss = model([view])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(None)
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-5:]) / 5 < 0.5
