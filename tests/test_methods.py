"""methods.py and spark.py: what holds for every method, whatever it is.

The tests run over methods.METHODS: a method that is added there is tested here.
"""

import copy

import pytest
import torch
from every_method import (
    ALONE,
    LOCAL,
    ZCA,
    batches_for,
    optim_settings,
    small,
    small_with_additions,
    take_step,
    trained_parameters,
    training_batches,
)
from ranks import train_all
from tiny import tiny_resnet

from engine.config import to_config
from losses import matched_points
from methods import METHODS
from moco import row_ranges
from pretraining.guard import Guard
from pretraining.optimizers import make_optimizer

every_method = pytest.mark.parametrize("name", METHODS)
taking_additions = pytest.mark.parametrize("name", [name for name in METHODS if name not in ALONE])


# ---- One process and many ----


@pytest.mark.parametrize(
    ("world", "dtype", "steps", "splits", "tolerance"),
    [
        (2, torch.float64, 3, [0], 1e-10),
        pytest.param(2, torch.float64, 3, [4], 1e-10, marks=pytest.mark.long),
        pytest.param(4, torch.float64, 3, [4, 0], 1e-10, marks=pytest.mark.long),
        (2, torch.float32, 1, [4], 1e-5),
        pytest.param(2, torch.float32, 1, [0], 1e-5, marks=pytest.mark.long),
        pytest.param(4, torch.float32, 1, [4, 0], 1e-5, marks=pytest.mark.long),
    ],
)
def test_many_ranks_compute_what_one_does(
    server, tmp_path, free_port, world, dtype, steps, splits, tolerance
):
    """Terms, state and gradients; with regions and whitening where the method takes them; BatchNorm over
    four samples, and over the global batch."""
    samples = 4 * world
    as_words = [free_port, str(dtype), steps, samples, ",".join(map(str, splits))]
    command = ["tests/ranks.py", tmp_path, world, *as_words]
    ranks = [server.start([*command, rank], tmp_path / f"{rank}.log") for rank in range(world)]
    expected = train_all(0, 1, dtype, steps, samples, splits)
    assert [rank.wait() for rank in ranks] == [0] * world, (tmp_path / "0.log").read_text()[-2000:]
    assert {*expected} == {(name, split) for name in METHODS for split in splits}
    # Rounding is magnified backwards; in float32 it also turns single ReLUs on or off.
    of_gradients = 10 * tolerance if dtype == torch.float64 else 1e-2
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for which, (terms, state, gradients) in expected.items():
            rank_terms, rank_state, rank_gradients = found[which]
            for ours, one in zip(rank_terms, terms, strict=True):
                assert ours == pytest.approx(one, rel=tolerance, abs=tolerance), which
            assert rank_state.pop("_extra_state") == state["_extra_state"]
            for key, value in rank_state.items():
                torch.testing.assert_close(value, state[key], rtol=10 * tolerance, atol=tolerance)
            length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            errors = {key: (rank_gradients[key] - one).norm() / length for key, one in gradients.items()}
            assert max(errors.values()) < of_gradients, which


def test_ranks_of_the_test_above_keep_different_numbers_of_images():
    """Else the mean over the images of all ranks would not be tested."""
    for samples in (8, 16):
        (_, _, *boxes) = next(training_batches(1, samples))
        keep = matched_points(*boxes, (64, 64), 32)[2]
        assert len({int(half.sum()) for half in keep.split(4)}) > 1


# ---- Steps that do not count, parts of steps ----


def everything(model, optimizer):
    """All that a step may change, as copies: tensors by name."""
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "_extra_state"}
    for number, averages in enumerate(optimizer.state.values()):
        state |= {f"{number}.{name}": value.clone() for name, value in averages.items()}
    return state


@pytest.mark.parametrize(
    "optimizer", ["sgd", *(pytest.param(name, marks=pytest.mark.long) for name in ("lars", "adamw"))]
)
@every_method
def test_a_bad_step_changes_nothing(name, optimizer):
    """The first one, and one after a good step. (The optimisers by themselves: test_optimizers.py.)"""
    model = small_with_additions(name, bn_split=2)
    optimizer = make_optimizer(to_config(optim_settings(optimizer)), model)
    guard = Guard(model, optimizer, most=5)
    for value, (views, boxes) in zip((torch.nan, torch.inf), batches_for(name, 2)):
        before = everything(model, optimizer)
        bad = [view.clone() for view in views]
        for view in bad:
            view[1, 0, 3, 5] = value
        assert not take_step(model, optimizer, bad, boxes, guard=guard)[1]
        after = everything(model, optimizer)
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert take_step(model, optimizer, views, boxes, guard=guard)[1]
        changed = {key for key, value in everything(model, optimizer).items() if not value.equal(before[key])}
        assert set(trained_parameters(model)) - changed <= at_rest(model)
    assert model.step == 4  # the seed of what the next step draws, bad or not


def at_rest(model):
    """Parameters that the first steps need not move."""
    return {"prototypes"} if hasattr(model, "resting") else set()


@every_method
def test_a_method_knows_whether_parts_add_up(name):
    """`whole_batch` against the loss itself: of halves and of the whole, every sample normalised alone."""
    model = small(name).double().eval()
    ((views, boxes),) = batches_for(name, 1, dtype=torch.float64)
    targets = model.targets(views, boxes)
    whole = model(views, boxes, targets)["loss"].item()
    halves = 0
    for rows in row_ranges(8, 2):
        some = [view[rows] for view in views], [box[rows] for box in boxes]
        halves += model(*some, targets.part(rows))["loss"].item() / 2
    assert (halves == pytest.approx(whole, rel=1e-9)) != METHODS[name].whole_batch


# ---- What every method has ----


@every_method
def test_all_trained_parameters_get_a_gradient(name):
    """Otherwise DistributedDataParallel waits for it, and an optimiser's averages are not those of a run."""
    for make in (small, small_with_additions):
        model = make(name, bn_split=4)
        model.progress = 0.5
        ((views, boxes),) = batches_for(name, 1)
        terms = model(views, boxes, model.targets(views, boxes))
        assert all(value.dim() == 0 for value in terms.values())
        assert {"loss", "global", "local"} <= set(terms)
        terms["loss"].backward()
        without = [key for key, p in trained_parameters(model).items() if p.grad is None or not p.grad.any()]
        assert without == []
        assert [
            key for key, p in model.named_parameters() if not p.requires_grad and p.grad is not None
        ] == []


@taking_additions
def test_the_additions_count_as_their_weight_says(name):
    ((views, boxes),) = batches_for(name, 1)
    model = small(name, bn_split=4, local={**LOCAL, "weight": 0.7}, decorrelation=ZCA, weight=0.3)
    terms = model(views, boxes, model.targets(views, boxes))
    assert terms["local"] > 0
    torch.testing.assert_close(terms["loss"], 0.3 * terms["global"] + 0.7 * terms["local"])


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_combined_is_refused_in_one_line(name):
    for addition, word in (({"local": LOCAL}, "local.weight"), ({"decorrelation": ZCA}, "decorrelation")):
        with pytest.raises(ValueError, match=word) as error:
            small(name, **addition)
        assert "\n" not in str(error.value)


@every_method
def test_a_method_learns(name):
    """A few steps on one batch make its loss smaller."""
    model = small_with_additions(name, bn_split=4)
    settings = optim_settings("adamw", lr=2e-3)
    optimizer = make_optimizer(to_config(settings), model)
    ((views, boxes),) = batches_for(name, 1)
    losses = [take_step(model, optimizer, views, boxes)[0]["loss"].item() for _ in range(8)]
    assert losses[-1] < losses[0]


@every_method
def test_bf16_and_channels_last_change_the_loss_a_little(name):
    """Under autocast, in the layout of a run: against float32 as it is."""
    ((views, boxes),) = batches_for(name, 1)
    plain = small_with_additions(name, bn_split=4)
    expected = plain(views, boxes, plain.targets(views, boxes))
    model = small_with_additions(name, bn_split=4).to(memory_format=torch.channels_last)
    views = [view.to(memory_format=torch.channels_last) for view in views]
    same = copy.deepcopy(model)
    terms = same(views, boxes, same.targets(views, boxes))
    torch.testing.assert_close(terms["loss"], expected["loss"], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(views, boxes, model.targets(views, boxes))
    assert all(value.dtype == torch.float32 for value in terms.values())
    torch.testing.assert_close(terms["loss"], expected["loss"], rtol=0.1, atol=0.1)
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in trained_parameters(model).values())


@every_method
def test_weights_and_state_can_be_taken_elsewhere(name, tmp_path):
    """The encoder strictly into torchvision's ResNet; the state into another instance, which goes on."""
    model = small_with_additions(name, bn_split=2)
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.05)
    (views, boxes), last = batches_for(name, 2, n=4)
    take_step(model, optimizer, views, boxes)
    resnet = tiny_resnet().eval()
    resnet.load_state_dict(model.query.encoder.export_state_dict(), strict=True)
    with torch.no_grad():
        maps = model.query.encoder.eval()(views[0])["layer4"]
        torch.testing.assert_close(resnet(views[0]), maps.mean((2, 3)), atol=1e-4, rtol=1e-4)
    model.train()

    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = small_with_additions(name, bn_split=2)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    optimizers = optimizer, torch.optim.SGD(trained_parameters(other).values(), lr=0.05)
    ours, theirs = (take_step(m, o, *last)[0] for m, o in zip((model, other), optimizers))
    assert {key: v.item() for key, v in ours.items()} == {key: v.item() for key, v in theirs.items()}
