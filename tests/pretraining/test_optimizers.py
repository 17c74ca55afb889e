"""pretraining/optimizers.py: LARS against a slow loop, what each parameter gets, skipped steps."""

import copy
import math
from pathlib import Path

import pytest
import torch
from every_method import batches_for, optim_settings, small, take_step, trained_parameters
from torch import nn

import train_moco
from engine.config import load_config, to_config
from engine.files import checked_optimizer, first_averages
from methods import METHODS
from pretraining.method_settings import settle
from pretraining.optimizers import LARC, LARS, make_optimizer

NAMES = ("sgd", "lars", "larc", "adamw")
PLAIN = ("lars", "adamw")  # that treat biases and norms otherwise than weights


def optimizer_of(name, model, **changes):
    return make_optimizer(to_config(optim_settings(name, **changes)), model)


def group_of(optimizer, parameter):
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


class Two(nn.Module):
    """A matrix and a vector, as a method has them."""

    at_constant_rate = ()

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))


def gradients(step):
    generator = torch.Generator().manual_seed(10 + step)
    return torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)


# ---- LARS ----


def test_lars_equals_a_loop_over_numbers():
    """Of the weight: decayed gradient, brought to 0.001 of the weight's length, momentum, rate. Of the bias:
    plain momentum."""
    model, lr, decay, momentum = Two(), 0.8, 0.01, 0.9
    optimizer = optimizer_of("lars", model, lr=lr, weight_decay=decay, momentum=momentum)
    weight, bias = model.weight.detach().double().flatten().tolist(), model.bias.detach().double().tolist()
    velocities = [0.0] * 12, [0.0] * 4
    for step in range(5):
        model.weight.grad, model.bias.grad = gradients(step)
        slopes = [g + decay * w for g, w in zip(model.weight.grad.flatten().tolist(), weight)]
        plain = model.bias.grad.tolist()
        optimizer.step()
        length, slope = (math.sqrt(sum(v**2 for v in values)) for values in (weight, slopes))
        slopes = [0.001 * length / slope * s for s in slopes]
        for values, steps, velocity in zip((weight, bias), (slopes, plain), velocities):
            for i, change in enumerate(steps):
                velocity[i] = momentum * velocity[i] + change
                values[i] -= lr * velocity[i]
        torch.testing.assert_close(model.weight.detach().flatten().tolist(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.bias.detach().tolist(), bias, rtol=1e-5, atol=1e-6)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]


def test_the_first_step_of_lars_has_the_length_of_the_weights():
    for scale in (1e-6, 1.0, 1e6):
        model = Two()
        before = model.weight.detach().clone()
        optimizer = optimizer_of("lars", model, lr=2.0, weight_decay=0.0)
        model.weight.grad, model.bias.grad = (scale * g for g in gradients(0))
        optimizer.step()
        assert (model.weight - before).norm().item() == pytest.approx(0.002 * before.norm().item(), rel=1e-3)


def test_lars_of_zeros_is_finite():
    """Weights of 0 take a plain step; no gradient, no step."""
    model = Two()
    model.weight.data.zero_()
    optimizer = optimizer_of("lars", model, lr=0.5)
    model.weight.grad, model.bias.grad = gradients(0)
    expected = -0.5 * model.weight.grad
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected)
    model = Two()
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = (torch.zeros_like(g) for g in gradients(0))
    optimizer_of("lars", model, weight_decay=0.0).step()
    assert torch.equal(model.weight, before)


# ---- As published ----

PUBLISHED = {  # loss over our "global"; rates of weights, of norms and biases at a batch of 256; weight decay
    "simclr": (2, 0.3, 0.3, 1e-6),
    "byol": (1, 0.3, 0.3, 1e-6),
    "swav": (1, 0.3, 0.3, 1e-6),
    "barlow": (1, 0.2, 0.0048, 1.5e-6),
    "vicreg": (1, 0.2, 0.2, 1e-6),
    "vicregl": (1, 0.2, 0.2, 1e-6),
    "pixpro": (2, 1.0, 1.0, 1e-5),
}


def published(name):
    """The settings of configs/methods/NAME.yaml."""
    overrides = ["data.root=set"]
    file = Path(train_moco.__file__).parent / f"configs/methods/{name}.yaml"
    cfg = load_config(train_moco.DEFAULTS, [file], overrides, train_moco.NULLABLE)
    settle(cfg, METHODS, overrides)
    train_moco.check_config(cfg)
    return cfg


def published_step(p, velocity, rate, decay, larc):
    """Of the authors' LARS, or of apex's LARC, which SwAV has, but for the 1e-8 beside its lengths."""
    g = p.grad
    if p.dim() > 1 or larc:
        length, slope = p.norm(), (g + decay * p).norm()
        if larc:
            slope = g.norm() + decay * length
        g = (g + decay * p) * (0.001 * length / slope if length > 0 and slope > 0 else 1)
    velocity.mul_(0.9).add_(g)
    p.sub_(rate * velocity)


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_of_the_published_configs_are_those_of_the_authors_code(name):
    """Weights, norms and biases after some steps, the rate at rest; heads of a few numbers."""
    cfg, (scale, *rates, decay) = published(name), PUBLISHED[name]
    model = small(name, bn_split=cfg.model.bn_split, weight=cfg.model.weight).double()
    model.progress = 0.5
    theirs, optimizer = copy.deepcopy(model), make_optimizer(cfg, model)
    velocities = {key: torch.zeros_like(p) for key, p in trained_parameters(theirs).items()}
    start = {key: p.detach().clone() for key, p in trained_parameters(model).items()}
    for views, boxes in batches_for(name, 3, n=4, dtype=torch.float64):
        take_step(model, optimizer, views, boxes)
        theirs.zero_grad()
        targets = theirs.targets(views, boxes)
        (scale * theirs(views, boxes, targets)["global"]).backward()
        with torch.no_grad():
            for key, p in trained_parameters(theirs).items():
                published_step(p, velocities[key], rates[p.dim() < 2], decay, name == "swav")
        theirs.after_step(targets)
    for key, p in trained_parameters(theirs).items():
        step, expected = trained_parameters(model)[key] - start[key], p - start[key]
        assert expected.norm() > 0, key
        assert (step - expected).norm() < 1e-8 * expected.norm() + 1e-13, key


def test_every_config_with_lars_is_tried_above():
    files = (Path(train_moco.__file__).parent / "configs/methods").glob("*.yaml")
    adaptive = {file.stem for file in files if published(file.stem).optim.name in ("lars", "larc")}
    assert adaptive == set(PUBLISHED)


# ---- Which parameters are treated how ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_biases_and_norms_have_no_weight_decay_but_with_sgd_and_larc(method, name):
    """Every trained parameter once; MoCo's recipe, SGD, decays all of them, and SwAV's, LARC."""
    model = small(method, **({} if method == "spark" else {"local": {}}))
    optimizer = optimizer_of(name, model, weight_decay=0.25)
    trained = trained_parameters(model)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(trained) == len({id(p) for p in listed} & {id(p) for p in trained.values()})
    for key, parameter in trained.items():
        group = group_of(optimizer, parameter)
        plain = parameter.dim() < 2
        assert group["weight_decay"] == (0.0 if plain and name in PLAIN else 0.25), key
        assert group["adaptive"] == (not plain or name not in PLAIN), key
        assert plain or not key.endswith("bias"), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_only_the_predictor_of_simsiam_keeps_its_rate(method, name):
    model = small(method)
    optimizer = optimizer_of(name, model)
    at_rest = [k for k, p in trained_parameters(model).items() if group_of(optimizer, p)["constant"]]
    predictor = [key for key in trained_parameters(model) if key.startswith("predictor.")]
    assert at_rest == (predictor if method == "simsiam" else [])
    assert method != "simsiam" or len(predictor) == 5  # two layers, the first without bias, and a norm


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_and_settings_are_those_of_the_config(name):
    model = Two()
    optimizer = optimizer_of(name, model, lr=0.3, momentum=0.7)
    kinds = {"sgd": torch.optim.SGD, "lars": LARS, "larc": LARC, "adamw": torch.optim.AdamW}
    assert type(optimizer) is kinds[name]
    assert all(group["lr"] == 0.3 and group["fused"] for group in optimizer.param_groups)
    assert name == "adamw" or all(group["momentum"] == 0.7 for group in optimizer.param_groups)


# ---- Skipped steps, and state ----


def state_of(model, optimizer):
    averages = [value.clone() for state in optimizer.state.values() for value in state.values()]
    return [p.detach().clone() for p in model.parameters()] + averages


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_found_bad_changes_nothing(name, bad):
    """Weights, momenta, AdamW's count of steps; the first step, and one after others. The next good one is
    what it would have been."""
    model, undisturbed = Two(), Two()
    optimizer, other = optimizer_of(name, model), optimizer_of(name, undisturbed)
    for step in range(3):
        before = state_of(model, optimizer)
        model.weight.grad, model.bias.grad = gradients(step)
        model.weight.grad[1, 1] = bad
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert all(map(torch.equal, state_of(model, optimizer), before))
        for one, its in ((model, optimizer), (undisturbed, other)):
            one.weight.grad, one.bias.grad = gradients(step)
            its.found_inf = torch.tensor(0.0)
            its.step()
        assert all(map(torch.equal, state_of(model, optimizer), state_of(undisturbed, other)))
        assert not torch.equal(before[0], model.weight)


@pytest.mark.parametrize("name", NAMES)
def test_averages_are_there_from_the_start_and_are_all_there_is(name):
    """What a checkpoint is compared with (engine/files.py) is what the optimiser really keeps."""
    model = Two()
    optimizer = optimizer_of(name, model)
    first = {p: {key: value.clone() for key, value in s.items()} for p, s in optimizer.state.items()}
    for parameter in model.parameters():
        assert first[parameter].keys() == first_averages(optimizer, parameter).keys()
        assert not any(value.any() for value in first[parameter].values())
    model.weight.grad, model.bias.grad = gradients(0)
    optimizer.step()
    for parameter, averages in optimizer.state.items():
        assert averages.keys() == first[parameter].keys()
        assert all(v.shape == first[parameter][key].shape for key, v in averages.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_optimiser_goes_on_bitwise(name, tmp_path):
    """Through a file and the check of a checkpoint's content."""
    model = small("simsiam", bn_split=2)
    optimizer = optimizer_of(name, model)
    first, last = batches_for("simsiam", 2, n=4)
    take_step(model, optimizer, *first)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pth")
    saved, averages = torch.load(tmp_path / "saved.pth", weights_only=True)
    other = small("simsiam", bn_split=2)
    other.load_state_dict(saved)
    loaded = optimizer_of(name, other)
    loaded.load_state_dict(checked_optimizer(loaded, averages))
    for one, its in ((model, optimizer), (other, loaded)):
        take_step(one, its, *last)
    assert all(map(torch.equal, state_of(model, optimizer), state_of(other, loaded)))
    assert [g["constant"] for g in loaded.param_groups] == [g["constant"] for g in optimizer.param_groups]


@pytest.mark.parametrize(("name", "other"), [("sgd", "adamw"), ("adamw", "lars"), ("lars", "sgd")])
def test_the_state_of_another_optimiser_is_refused(name, other):
    model = Two()
    with pytest.raises((ValueError, KeyError)):
        checked_optimizer(optimizer_of(name, model), optimizer_of(other, model).state_dict())
