"""Can the local task be solved without looking? Position cues of zero padding, measured on trained networks.

    python -m experiments.position RUN ...      # finished pretraining runs; leaves position.json in each

The runs need run.keep_checkpoint=true: an encoder alone has no heads.

A convolution with zero padding tells a network where the border is. If a region only has to be found at the
same place of both views (local.match: grid), knowing the place is enough. So trained networks here match the
regions of two images of noise that have nothing in common, once as trained and once with reflected borders,
which say nothing about the place. Chance is one in grid * grid.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Intensity, SliceDataset, network_input
from engine.config import ConfigError, OneLineParser, to_config
from engine.files import load_checkpoint, write_whole
from engine.ownership import refuse_foreign
from engine.process import start_process
from engine.stopping import run_script
from losses import at_least_float32, local_nce_per_image, seeded
from moco import MoCo
from pretraining.monitor import validation_slices
from train_moco import build_model, make_views
from weights import fits

POSITION = "experiments.position"  # by which position.json is known, see engine/ownership.py
IMAGES = 256  # slices (at most) and images of noise


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a pretraining with local.weight > 0"
    )
    runs = parser.parse_args(argv).runs
    refuse_foreign([Path(run) / "position.json" for run in runs], [], POSITION, "RUN")
    for run in runs:
        found = position_cues(Path(run))
        write_whole(Path(run) / "position.json", json.dumps(found) + "\n", POSITION)
        print(json.dumps({"run": run, **found}))
    return 0


def position_cues(folder: Path) -> dict[str, dict[str, float]]:
    """{"slices" | "noise", ", reflected" added with such borders: {"accuracy", "loss"} of the local task}.

    The slices are the validation cases' or, without such, the first ones; the noise is new in each view.

    Raises:
        ConfigError: no checkpoint of a run with local features, and views of more than 32 px.
    """
    state = load_checkpoint(
        folder, lambda content: {name: content[name] | {} for name in ("config", "model")}
    )
    if state is None:
        raise ConfigError(
            f"{folder}: holds no checkpoint.pth of a pretraining run; run.keep_checkpoint=true keeps it"
        )
    cfg = to_config(state["config"])
    if not cfg.local.weight:
        raise ConfigError(f"{folder}: was pretrained without local features (local.weight = 0)")
    if cfg.data.size <= 32:
        raise ConfigError(f"{folder}: its views of {cfg.data.size} px are too small to reflect their borders")
    card = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    intensity = Intensity(**card["normalisation"])
    process = start_process(cfg.run)
    model = build_model(cfg, process)
    if not fits(state["model"], model.state_dict()):
        raise ConfigError(f"{folder}: its checkpoint.pth is not that of a run of config.yaml, or damaged")
    model.load_state_dict(state["model"])
    model.eval()

    place = (cfg.data.root, cfg.data.list, cfg.data.images, cfg.data.hu_offset)
    dataset = validation_slices(cfg) or SliceDataset(*place, neighbours=cfg.data.neighbours)
    rows = range(0, len(dataset), -(-len(dataset) // IMAGES))
    views = make_views(cfg, dataset, intensity)
    unit = intensity.to_unit(torch.stack([dataset[i] for i in rows]))
    query, key, query_box, key_box = views(unit, seeded("position", cfg.seed))
    pairs = {"slices": (query, key), "noise": noise(query.shape, seeded("noise", cfg.seed))}

    found = {}
    for border in ("zeros", "reflect"):
        set_borders(model, border)
        for name, pair in pairs.items():
            seen = [network_input(view, intensity, cfg.model.in_channels) for view in pair]
            place = (view.to(process.device) for view in (*seen, query_box, key_box))
            found[name + (", reflected" if border == "reflect" else "")] = local_task(model, *place)
    return found


def noise(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views (N, C, h, w) in [0, 1] of smooth noise, independent of each other."""
    white = torch.randn(2, *shape, generator=generator)
    smooth = F.avg_pool2d(F.pad(white.flatten(0, 1), (2, 2, 2, 2), mode="reflect"), 5, stride=1).view_as(
        white
    )
    return tuple((0.5 + 0.25 * smooth / smooth.std()).clamp(0, 1))


def set_borders(model: nn.Module, mode: str) -> None:
    """Pad all convolutions with "zeros" or by "reflect"ing."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode
            # PyTorch takes this from the padding at construction; the output stride has changed it since.
            module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]


@torch.no_grad()
def local_task(
    model: MoCo, query: Tensor, key: Tensor, query_box: Tensor, key_box: Tensor
) -> dict[str, float]:
    """Share of regions whose own key region is the most similar one of the image, and the loss."""
    keys = model.targets([query, key], [query_box, key_box], parts=-(-len(key) // 32))
    parts = zip(query.split(32), keys.query_points.split(32))
    regions = torch.cat([at_least_float32(model.query(*part)[1]) for part in parts])
    keep = keys.local_weight > 0
    similarity = F.normalize(regions, dim=2) @ F.normalize(keys.regions, dim=2).mT  # (N, R, R)
    right = similarity.argmax(dim=2) == torch.arange(similarity.shape[1], device=similarity.device)
    loss = local_nce_per_image(regions, keys.regions, model.local["temperature"])
    return {
        "accuracy": round(float(right[keep].float().mean()), 4),
        "loss": round(float(loss[keep].mean()), 4),
    }


if __name__ == "__main__":
    run_script(main, ())
