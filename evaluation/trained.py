"""A trained model as a file: model.pth, the weights with all that is needed to use them on other slices."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ct.properties import Facts, parse_facts
from ct.slices import IGNORE
from data import Intensity
from engine.config import ConfigError
from engine.files import written_whole
from engine.process import Process
from models import Encoder
from weights import WeightsError, first_class, fits, read_weights


@dataclass
class Description:
    """What it takes to rebuild and use a trained model; in model.pth beside the weights."""

    mode: str
    arch: str
    in_channels: int
    output_stride: int
    classes: list[str]
    normalisation: dict
    facts: Facts  # of the slices that it was trained on
    width: int | None = None  # of a detector


def save_model(path: Path, model: nn.Module, about: Description) -> None:
    with written_whole(path) as file:
        torch.save({"about": asdict(about), "state": model.state_dict()}, file)


def load_model(path: Path, process: Process, build) -> tuple[nn.Module, Description]:
    """The model, in evaluation mode.

    build: (description, encoder) -> the model.

    Raises ConfigError if there is none, WeightsError if the file is damaged or of another evaluation.
    """
    if not path.is_file():
        raise ConfigError(f"run.out: no trained model in {path.parent} (model.pth); evaluate there first")
    content = read_weights(path)
    try:
        about, state = description_of(content["about"]), content["state"]
        sound = isinstance(state, dict) and 1 < len(about.classes) <= IGNORE
        first = next(rows for name, rows in state.items() if name.endswith("encoder.conv1.weight"))
        sound = sound and about.in_channels == first.shape[1] and first_class(content) is None
        if not sound or not Intensity(**about.normalisation)(torch.zeros(1)).isfinite():
            raise ValueError
        model = build(about, Encoder(about.arch, about.in_channels, output_stride=about.output_stride))
        if not fits(state, model.state_dict()):
            raise ValueError
        model.load_state_dict(state)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError, StopIteration):
        raise WeightsError(f"{path}: not a model of this program, or damaged") from None
    return model.to(process.device, memory_format=torch.channels_last).eval(), about


def description_of(saved: dict) -> Description:
    """From a file; models from before 26 November 2026 know of their slices whether they hold HU."""
    facts = saved.get("facts", {"kind": saved.get("stored")})
    rest = {name: value for name, value in saved.items() if name not in ("facts", "stored")}
    return Description(**rest, facts=parse_facts(facts, "model.pth"))
