"""The encoder that an evaluation is of: its file, and the normalisation that travels with it."""

import hashlib
import json
from pathlib import Path

from data import Intensity, default_window
from engine.config import Config, ConfigError, config_errors
from engine.process import Process
from models import Encoder, WeightsError, architecture_of, load_encoder_weights, weights_file


def path_of(cfg: Config) -> Path | None:
    """The weights file; None for a random encoder."""
    return None if cfg.encoder == "random" else weights_file(cfg.encoder)


def facts_of(path: Path | None) -> dict:
    """What encoder.json beside our encoder.pth says: {"arch", "normalisation": {...}}; {} without one."""
    sidecar = path and path.with_suffix(".json")
    if sidecar is None or not sidecar.is_file():
        return {}
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        window, mean, std = (facts["normalisation"][name] for name in ("window", "mean", "std"))
        Intensity(window, mean + 0.0, std + 0.0)
        return {"arch": str(facts["arch"]), "window": window, "mean": mean, "std": std}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{sidecar}: does not describe an encoder; restore it or remove it") from None


def agreed(cfg: Config, name: str, facts: dict):
    """A value that config and encoder may both give, in which case they must agree; None if neither does.

    Raises ConfigError with both values.
    """
    section, key = name.split(".")
    given = cfg[section][key]
    if key not in facts:
        return given
    left_open = "auto" if key == "window" else None
    if given not in (left_open, facts[key]):
        raise ConfigError(f"{name}: {given!r} contradicts {facts[key]!r} of {path_of(cfg)}")
    return facts[key]


def normalisation(cfg: Config, facts: dict, stored: str) -> Intensity:
    """The encoder's own normalisation, else the config's, else the default for the kind of stored values."""
    window = agreed(cfg, "data.window", facts)
    if window == "auto":
        window = default_window(stored)
    values = {name: agreed(cfg, f"data.{name}", facts) for name in ("mean", "std")}
    return Intensity(window, **{name: value for name, value in values.items() if value is not None})


def build_encoder(cfg: Config, facts: dict, process: Process) -> Encoder:
    """The encoder with its initial weights, at the evaluation's output stride."""
    path = path_of(cfg)
    arch = agreed(cfg, "model.arch", facts)
    if arch is None and path and (arch := architecture_of(path)):
        process.say(f"model.arch: {arch}, as the weights in {path} show")
    arch = arch or "resnet50"
    with config_errors():
        encoder = Encoder(arch, cfg.model.in_channels)
        encoder.set_output_stride(cfg.model.output_stride)
    if path:
        process.say(str(load_encoder_weights(encoder, path)))
    return encoder


def check_same_encoder(cfg: Config, before: str | None) -> None:
    if before != sha256(path_of(cfg)):
        raise ConfigError(
            f"encoder: {cfg.encoder} has changed since the run in {cfg.run.out}; remove that run"
        )


def sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
