"""Which settings a method has, what they are when nobody gives them, and which cannot work with it."""

import inspect

from engine.config import Config, ConfigError
from engine.process import Process
from moco import Method
from models import SplitBatchNorm1d, layer_strides

# Of the section model; null in a config stands for the value that the method's class has.
SETTINGS = ("weight", "dim", "hidden", "queue_size", "momentum", "temperature", "prototypes", "mask")


def settle(cfg: Config, methods: dict[str, type[Method]], overrides: list[str]) -> list[str]:
    """Put the method's own values where cfg has null, and the number of channels with neighbours. Returns the
    settings given in files that this method does not have, which become null: a file may be there for
    several methods.

    overrides: "section.key=value" of the command line.

    Raises:
        ConfigError: an unknown method, or an override that is another method's.
    """
    cfg.check_choice("method", *methods)
    own, unused = defaults_of(methods[cfg.method]), []
    for name in SETTINGS:
        if name in own:
            cfg.model[name] = own[name] if cfg.model[name] is None else cfg.model[name]
            continue
        if any(text.startswith(f"model.{name}=") for text in overrides) and cfg.model[name] is not None:
            there = ", ".join(f"model.{one}" for one in SETTINGS if one in own)
            raise ConfigError(f"model.{name}: {cfg.method} has no such setting; it has {there}")
        if cfg.model[name] is not None:
            unused.append(f"model.{name}")
        cfg.model[name] = None
    cfg.model["in_channels"] = 3 if cfg.data.neighbours else cfg.model.in_channels
    is_moco = cfg.method == "moco"  # whose default is the paper's whole method; others are as published
    if cfg.local.weight is None:
        cfg.local["weight"] = 0.5 if is_moco else 0.0
    if cfg.decorrelation.method is None:
        cfg.decorrelation["method"] = "zca" if is_moco else "none"
    return unused


def defaults_of(method: type[Method]) -> dict:
    """The arguments of a class, and of those that it is made from, with their default values."""
    defaults = {}
    for one in reversed(method.__mro__):
        if "__init__" in vars(one) and issubclass(one, Method):
            for name, argument in inspect.signature(one.__init__).parameters.items():
                if argument.default is not inspect.Parameter.empty:
                    defaults[name] = argument.default
    return defaults


def own_settings(cfg: Config) -> dict:
    """Arguments for the method's class."""
    return {name: cfg.model[name] for name in SETTINGS if cfg.model[name] is not None}


def check_method(cfg: Config, method: type[Method]) -> None:
    """Raise a ConfigError for what the method cannot do with these settings."""
    name, batch, model = cfg.method, cfg.optim.batch_size, cfg.model
    for one in ("dim", "hidden", "queue_size", "temperature", "prototypes"):
        if model[one] is not None:
            cfg.check_positive(f"model.{one}")
    if model.weight is not None:
        cfg.check_not_negative("model.weight")
    if model.momentum is not None:
        cfg.check_fraction("model.momentum")
    if model.mask is not None:
        cfg.check("model.mask", 0 < model.mask < 1, "a share between 0 and 1")
    if model.queue_size is not None:
        cfg.check("model.queue_size", model.queue_size >= batch, f"optim.batch_size, {batch}, or more")
    if method.whole_batch:
        cfg.check("optim.batch_size", batch > 1, f"2 or more: {name} compares the samples of a batch")
        parts = f"1: the loss of {name} compares all samples of the batch, so parts of it do not add up to it"
        cfg.check("optim.accumulate", cfg.optim.accumulate == 1, parts)
    elif (
        cfg.optim.accumulate > 1
        and cfg.local.weight
        and cfg.local.negatives == "batch"
        and "momentum" not in defaults_of(method)
    ):
        raise ConfigError(
            f"local.negatives: 'batch' is impossible with {name} and optim.accumulate > 1: it has no "
            "momentum encoder whose regions of the whole batch would be there"
        )
    cfg.check(
        "augment.small_crops",
        method.small_crops or not cfg.augment.small_crops,
        f"0: {name} has no use for them",
    )

    sides = map_sides(cfg)
    more = "a larger data.size, or a smaller model.output_stride"
    if method.dense and sides["layer4"] < 2:
        raise ConfigError(
            f"data.size: views of {cfg.data.size} px have one position in layer4, and {name} compares "
            f"positions; {more}"
        )
    if cfg.local.weight and sides[cfg.local.layer] < 2:
        raise ConfigError(
            f"local.grid: views of {cfg.data.size} px have one position in {cfg.local.layer}, so all "
            f"regions are the same; {more}, or local.weight=0"
        )
    if method.hides_cells:
        cell = model.output_stride
        wanted = (
            f"a multiple of {cell}, {2 * cell} or more: {name} hides cells as wide as model.output_stride"
        )
        cfg.check("data.size", cfg.data.size % cell == 0 and cfg.data.size >= 2 * cell, wanted)
        cfg.check(
            "run.compile", not cfg.run.compile, f"false: {name} changes what its layers see in every step"
        )


def map_sides(cfg: Config) -> dict[str, int]:
    """Of each layer's map of a view."""
    strides = layer_strides(cfg.model.output_stride)
    return {layer: -(-cfg.data.size // stride) for layer, stride in strides.items()}


def check_norms(cfg: Config, model: Method, process: Process) -> None:
    """Raise a ConfigError where a BatchNorm would have to normalise a single value."""
    share, split = cfg.optim.batch_size // process.world // cfg.optim.accumulate, cfg.model.bn_split
    together = min(split, share) if split else share * process.world
    vectors = map_sides(cfg)["layer4"] == 1 or any(isinstance(m, SplitBatchNorm1d) for m in model.modules())
    if together > 1 or not vectors:
        return
    name, found = ("model.bn_split", split) if split == 1 else ("optim.batch_size", cfg.optim.batch_size)
    raise ConfigError(
        f"{name}: {found} leaves one sample to BatchNorm, but {cfg.method} normalises vectors, and one "
        "alone has no variance; 2 or more are needed"
    )
