"""pretraining/method_settings.py: defaults of methods, settings of other methods, and what cannot work."""

import pytest
import torch
from every_method import ALONE, small

import train_moco
from engine.config import ConfigError, load_config
from engine.process import Process
from methods import METHODS
from moco import whole_slices
from pretraining.method_settings import SETTINGS, check_norms, defaults_of, own_settings, settle

every_method = pytest.mark.parametrize("name", METHODS)


def settled(*overrides, file=None):
    """A config as train_moco.py has it after reading, and the unused settings of its file."""
    overrides = ["data.root=set", *overrides]
    cfg = load_config(train_moco.DEFAULTS, file, overrides, train_moco.NULLABLE)
    unused = settle(cfg, METHODS, overrides)
    train_moco.check_config(cfg)
    return cfg, unused


def config(name, *overrides):
    return settled(f"method={name}", *overrides)[0]


# ---- Whose settings these are ----


@every_method
def test_defaults_are_those_of_the_class(name):
    cfg, defaults = config(name), defaults_of(METHODS[name])
    for setting in SETTINGS:
        assert cfg.model[setting] == defaults.get(setting), setting
    assert own_settings(cfg) == {n: v for n, v in defaults.items() if n in SETTINGS and v is not None}
    assert set(SETTINGS) >= {"dim", "queue_size"} and set(SETTINGS) <= set(cfg.model)
    if name != "moco":  # the paper's additions are off unless asked for
        assert (cfg.local.weight, cfg.decorrelation.method) == (0.0, "none")


def test_moco_has_both_additions_by_default():
    cfg, _ = settled()
    assert (cfg.method, cfg.local.weight, cfg.decorrelation.method) == ("moco", 0.5, "zca")
    expected = {"weight": 1.0, "dim": 128, "queue_size": 65536, "momentum": 0.999, "temperature": 0.2}
    assert own_settings(cfg) == expected


@every_method
def test_the_settings_of_a_method_reach_its_class(name):
    """Given on the command line, as numbers that no class has by itself."""
    values = dict(
        weight=0.5, dim=24, hidden=48, queue_size=300, momentum=0.5, temperature=0.7, prototypes=21, mask=0.4
    )
    own = {n: v for n, v in values.items() if n in defaults_of(METHODS[name])}
    cfg = config(name, *(f"model.{n}={v}" for n, v in own.items()))
    assert own_settings(cfg) == own
    cfg.model.arch, cfg.model.bn_split = "resnet18", 7
    model = train_moco.build_model(cfg, Process(0, 1, torch.device("cpu"), "fp32"))
    assert model.bn_split == 7 and type(model) is METHODS[name]
    for setting in {"momentum", "temperature", "mask"} & set(own):
        assert getattr(model, setting) == own[setting]
    sizes = {size for p in [*model.parameters(), *model.buffers()] for size in p.shape}
    assert {own[s] for s in ("dim", "hidden", "queue_size", "prototypes") if s in own} <= sizes


@every_method
def test_a_setting_of_another_method_is_refused_by_name_on_the_command_line(name):
    own = defaults_of(METHODS[name])
    for setting in SETTINGS:
        value = 0.5 if setting in ("momentum", "temperature", "mask") else 300
        if setting in own:
            config(name, f"model.{setting}={value}")
            continue
        message = f"^model.{setting}: {name} has no such setting; it has model\\."
        with pytest.raises(ConfigError, match=message) as error:
            config(name, f"model.{setting}={value}")
        assert "\n" not in str(error.value)
        there = str(error.value).split("it has ")[1].split(", ")
        assert there == [f"model.{one}" for one in SETTINGS if one in own]
        config(name, f"model.{setting}=null")  # as if it were not given


@every_method
def test_a_setting_of_another_method_in_a_file_is_ignored_and_named(name, tmp_path):
    """A file may be there for several methods; the command line speaks of one."""
    file = tmp_path / "all.yaml"
    values = dict(
        weight=0.5, dim=24, hidden=48, queue_size=300, momentum=0.5, temperature=0.7, prototypes=21, mask=0.4
    )
    file.write_text("model: {" + ", ".join(f"{n}: {v}" for n, v in values.items()) + "}\n")
    cfg, unused = settled(f"method={name}", file=file)
    own = defaults_of(METHODS[name])
    assert unused == [f"model.{n}" for n in SETTINGS if n not in own]
    assert own_settings(cfg) == {n: v for n, v in values.items() if n in own}


def test_of_several_files_and_the_command_line_the_last_counts(tmp_path):
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    files[0].write_text("method: simclr\nmodel: {temperature: 0.5, dim: 32}\nlocal: {weight: 0.3}\n")
    files[1].write_text("method: byol\nmodel: {dim: 64}\n")
    cfg, unused = settled("model.hidden=100", file=files)
    assert own_settings(cfg) == {"weight": 1.0, "dim": 64, "hidden": 100, "momentum": 0.99}
    assert unused == ["model.temperature"] and cfg.local.weight == 0.3


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("bylo", "byol"),
        ("simclrv2", "simclr"),
        ("MoCo", "moco"),
        ("sparK", "spark"),
        ("vicregL", "vicregl"),
        ("barlowtwins", "barlow"),
        ("dense-cl", "densecl"),
        ("pixpro2", "pixpro"),
        ("sim-siam", "simsiam"),
    ],
)
def test_an_unknown_method_is_answered_with_the_nearest_one(given, near):
    with pytest.raises(ConfigError, match=f"method: '{given}' is not one of.*did you mean '{near}'") as error:
        config(given)
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in METHODS)


@pytest.mark.parametrize("given", ["", "null", "1", "[moco]", "{a: 1}", "x" * 5000, "moco,byol"])
def test_a_method_that_is_none_is_one_line(given):
    with pytest.raises(ConfigError, match="method") as error:
        config(given)
    assert "\n" not in str(error.value)


# ---- What cannot work ----


@every_method
def test_numbers_out_of_range_name_their_setting(name):
    wrong = dict(dim=0, hidden=-1, queue_size=0, momentum=1.5, temperature=0.0, prototypes=0, mask=1.0)
    for setting, value in wrong.items():
        if setting in defaults_of(METHODS[name]):
            for one in (value, ".nan", "x"):
                with pytest.raises(ConfigError, match=f"^model.{setting}: "):
                    config(name, f"model.{setting}={one}")


@every_method
def test_a_loss_that_compares_samples_needs_a_whole_batch_of_them(name):
    if METHODS[name].whole_batch:
        with pytest.raises(ConfigError, match=f"^optim.batch_size: 1 .*2 or more: {name} compares"):
            config(name, "optim.batch_size=1")
        with pytest.raises(ConfigError, match=f"^optim.accumulate: 2 .*the loss of {name} compares all"):
            config(name, "optim.accumulate=2")
    else:
        config(name, "optim.batch_size=1")
        config(name, "optim.accumulate=2")


@every_method
def test_regions_of_the_whole_batch_need_keys_if_it_comes_in_parts(name):
    settings = ("local.weight=0.5", "local.negatives=batch", "optim.accumulate=2")
    if METHODS[name].whole_batch or name in ALONE:
        return
    if "momentum" in defaults_of(METHODS[name]):
        config(name, *settings)
        return
    with pytest.raises(ConfigError, match=f"^local.negatives: 'batch' is impossible with {name}"):
        config(name, *settings)
    config(name, *settings[::2])


@every_method
@pytest.mark.parametrize(("size", "stride"), [(32, 32), (16, 16), (8, 8), (1, 8)])
def test_a_view_with_one_position_is_too_small_for_what_compares_positions(name, size, stride):
    settings = (f"data.size={size}", f"model.output_stride={stride}")
    larger = (f"data.size={2 * max(size, 32)}", settings[1])
    config(name, *larger)
    if METHODS[name].dense or name in ALONE:
        with pytest.raises(ConfigError, match=f"^data.size: .*{name}") as error:
            config(name, *settings)
        assert "\n" not in str(error.value)
        return
    config(name, *settings, "local.weight=0")
    with pytest.raises(ConfigError, match=f"^local.grid: views of {size} px have one position in layer4"):
        config(name, *settings, "local.weight=0.5")
    if size > 8:
        config(name, *settings, "local.weight=0.5", "local.layer=layer2")


@pytest.mark.parametrize("size", [1, 32, 33, 48, 65, 100, 112, 223, 225])
def test_views_that_cells_do_not_fill_are_refused(size):
    with pytest.raises(ConfigError, match=f"^data.size: {size} .*a multiple of 32, 64 or more: spark hides"):
        config("spark", f"data.size={size}")
    assert config("spark", "data.size=64") and config("spark", "data.size=224")
    assert config("spark", "data.size=48", "model.output_stride=16")


@every_method
def test_small_crops_are_for_those_that_use_them(name):
    if METHODS[name].small_crops:
        assert config(name, "augment.small_crops=6").augment.small_crops == 6
        return
    with pytest.raises(ConfigError, match=f"^augment.small_crops: 6 .*{name} has no use for them"):
        config(name, "augment.small_crops=6")


@pytest.mark.parametrize("name", [name for name in METHODS if "queue_size" in defaults_of(METHODS[name])])
def test_a_queue_holds_a_batch_or_more(name):
    with pytest.raises(ConfigError, match="^model.queue_size: 64 .*optim.batch_size, 256, or more"):
        config(name, "model.queue_size=64")
    config(name, "model.queue_size=64", "optim.batch_size=64")


@pytest.mark.parametrize(
    ("batch", "split", "accumulate", "world", "key"),
    [
        (1, 0, 1, 1, "optim.batch_size: 1"),
        (1, 32, 1, 1, "optim.batch_size: 1"),
        (8, 1, 1, 1, "model.bn_split: 1"),
        (8, 32, 8, 1, "optim.batch_size: 8"),
        (8, 32, 4, 2, "optim.batch_size: 8"),
        (8, 4, 1, 8, "optim.batch_size: 8"),
        (8, 0, 8, 1, "optim.batch_size: 8"),
        (8, 0, 1, 8, None),  # over all processes
        (8, 2, 1, 1, None),
        (2, 0, 1, 1, None),
    ],
)
@every_method
def test_norms_of_vectors_need_two_samples(name, batch, split, accumulate, world, key):
    """Those of maps have many positions of one."""
    if METHODS[name].whole_batch and (accumulate > 1 or batch == 1):
        return
    settings = (f"optim.batch_size={batch}", f"model.bn_split={split}", f"optim.accumulate={accumulate}")
    cfg, model = config(name, *settings), small(name, bn_split=split)
    process = Process(0, world, torch.device("cpu"), "fp32")
    if key is None or not has_norms_of_vectors(model):
        check_norms(cfg, model, process)
        return
    with pytest.raises(ConfigError, match=f"^{key} leaves one sample to BatchNorm, but {name}") as error:
        check_norms(cfg, model, process)
    assert "\n" not in str(error.value)


def has_norms_of_vectors(model):
    """Found by trying: whether one image alone can be trained on."""
    views = [torch.randn(1, 1, 64, 64)] * 2
    for module in model.modules():
        if hasattr(module, "split"):
            module.split = 0
    try:
        model(views, [whole_slices(views[0])] * 2)
    except ValueError as error:
        assert "more than 1 value per channel" in str(error)
        return True
    return False


def test_maps_of_one_position_are_vectors_too():
    cfg, model = config("moco", "data.size=32", "local.weight=0", "model.bn_split=1"), small("moco")
    with pytest.raises(ConfigError, match="^model.bn_split: 1 leaves one sample"):
        check_norms(cfg, model, Process(0, 1, torch.device("cpu"), "fp32"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("local.weight=0.5",), "local.weight"),
        (("decorrelation.method=zca",), "decorrelation.method"),
        (("decorrelation.method=iternorm",), "decorrelation.method"),
        (("decorrelation.method=zca", "decorrelation.position=bn3"), "decorrelation.method"),
    ],
)
@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_combined_is_a_config_error(name, settings, key):
    cfg = config(name, "model.arch=resnet18", *settings)
    with pytest.raises(ConfigError, match=f"^{key}: ") as error:
        train_moco.build_model(cfg, Process(0, 1, torch.device("cpu"), "fp32"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ALONE])
@pytest.mark.parametrize("position", ["output", "bn3"])
def test_additions_reach_the_model(name, position):
    settings = ("local.weight=0.25", "local.grid=3", "decorrelation.method=zca")
    cfg = config(name, "model.arch=resnet18", f"decorrelation.position={position}", *settings)
    for setting in ("hidden", "dim"):
        if cfg.model[setting] is not None:
            cfg.model[setting] = 16
    model = train_moco.build_model(cfg, Process(0, 1, torch.device("cpu"), "fp32"))
    assert (model.local["weight"], model.local["grid"]) == (0.25, 3)
    whitened = {type(m).__name__: name for name, m in model.query.named_modules()}
    assert whitened["ZCAWhitening"] == ("decorrelation" if position == "output" else "encoder.layer4.1.bn2")
