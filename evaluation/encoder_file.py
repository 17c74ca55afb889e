"""The encoder that an evaluation is of: its file, and the normalisation that travels with it."""

from pathlib import Path

from data import Intensity, default_window, encoder_card
from engine.config import Config, ConfigError, config_errors
from engine.ownership import sha256
from engine.process import Process
from models import Encoder
from weights import architecture_of, initial_weights, load_encoder_weights


def path_of(cfg: Config) -> Path | None:
    """The weights file; None for a random encoder."""
    return initial_weights(cfg.encoder)


def agreed(cfg: Config, name: str, card: dict):
    """A value that config and encoder may both give, in which case they must agree; None if neither does.

    Raises ConfigError with both values.
    """
    section, key = name.split(".")
    given = cfg[section][key]
    if key not in card:
        return given
    left_open = "auto" if key == "window" else None
    if given not in (left_open, card[key]):
        raise ConfigError(f"{name}: {given!r} contradicts {card[key]!r} of {path_of(cfg)}")
    return card[key]


def normalisation(cfg: Config, card: dict, kind: str) -> Intensity:
    """The encoder's own normalisation, else the config's, else the default for the kind of values."""
    window = agreed(cfg, "data.window", card)
    if window == "auto":
        window = default_window(kind)
    values = {name: agreed(cfg, f"data.{name}", card) for name in ("mean", "std")}
    return Intensity(window, **{name: value for name, value in values.items() if value is not None})


def neighbours(cfg: Config) -> int:
    """data.neighbours, else that of the encoder."""
    if cfg.data.neighbours is not None:
        return cfg.data.neighbours
    card = encoder_card(path_of(cfg))
    return card["facts"].neighbours if card else 0


def architecture(cfg: Config, card: dict) -> str:
    """As config or encoder say, else as its weights show, else resnet50."""
    path = path_of(cfg)
    return agreed(cfg, "model.arch", card) or (path and architecture_of(path)) or "resnet50"


def build_encoder(cfg: Config, card: dict, neighbours: int, process: Process) -> Encoder:
    """The encoder with its initial weights, at the evaluation's output stride, for slices with so many
    neighbours."""
    path, arch = path_of(cfg), architecture(cfg, card)
    if agreed(cfg, "model.arch", card) is None and path and architecture_of(path):
        process.say(f"model.arch: {arch}, as the weights in {path} show")
    with config_errors():
        encoder = Encoder(arch, 3 if neighbours else cfg.model.in_channels)
        encoder.set_output_stride(cfg.model.output_stride)
    if path:
        process.say(str(load_encoder_weights(encoder, path)))
        if card.get("sha256") not in (None, sha256(path)):
            process.warn(
                f"encoder: {path.stem}.json beside {path} describes another file: its sha256 differs"
            )
    return encoder


def check_same_encoder(cfg: Config, before: str | None) -> None:
    if before != sha256_of(cfg):
        raise ConfigError(
            f"encoder: {cfg.encoder} has changed since the run in {cfg.run.out}; remove that run"
        )


def sha256_of(cfg: Config) -> str | None:
    """Of the weights file; None for a random encoder."""
    path = path_of(cfg)
    return path and sha256(path)
