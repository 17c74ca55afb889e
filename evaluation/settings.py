"""The settings and arguments that all eval_*.py have in common; imports nothing that takes time.

A script's settings are its own text and COMMON:

    DEFAULTS = "mode: linear ..." + COMMON
    NULLABLE = COMMON_NULLABLE | {"optim.lr": float}
"""

import argparse

from engine.config import Config, settings_parser

COMMON = """
seed: 0
encoder: null               # encoder.pth or another file of weights, the folder of a run, or random
label_fraction: 1.0         # share of the training cases; smaller ones are subsets of larger ones
run:
  out: runs/eval            # folder of the results
  device: auto              # auto | cpu | cuda
  precision: auto           # auto | fp32 | bf16; auto: bf16 where a GPU has it
  compile: false            # torch.compile: minutes at the start, some percent faster then
  timeout_minutes: 10.0     # how long a process waits for another one before giving up
  deterministic: false      # the same bits on the same GPU, slower; a CPU run always gives the same bits
data:
  root: null                # the data set's folder
  images: images            # folders below root; {split} is the list's name
  masks: masks
  train: train.txt
  val: val.txt              # chooses the best model; null: the last one is taken
  test: test.txt
  classes: null             # number of classes, or names, background first; null: those of set.json
  size: null                # side of the crops that a whole network is trained on, px; null: the slices' size
  window: auto              # [low, high] HU; null: unscaled; auto: the encoder's, else [-160, 240]
  neighbours: null          # 1: the slices below and above are further channels; null: the encoder's, else 0
  mask_map: null            # {pixel value or "r,g,b": class}, as {255: 1}; other grey values stay
  hu_offset: null           # HU = 16-bit value - hu_offset; null: the set's, or 1024; 0: values as stored
  mean: null                # of the windowed values; null: the encoder's, else 0.5
  std: null                 # null: the encoder's, else 0.25
  workers: 2                # reading processes for each training process
  insist: false             # go on, with a warning, where the data look impossible
augment:                    # where a whole network is trained; see augment.SegmentationAugment
  scale: [0.5, 2.0]
  flip: 0.0                 # probability; 0 because organs have sides
  brightness: 0.1
  contrast: 0.1
  gamma: 0.1
  noise: 0.02
log:
  every: 20                 # steps between lines of metrics.jsonl
"""

COMMON_NULLABLE = {
    "encoder": str,
    "data.root": str,
    "data.val": str,
    "data.classes": (int, list),
    "data.size": int,
    "data.mask_map": dict,
    "data.neighbours": int,
    "data.hu_offset": float,
    "data.window": (list, str),
    "data.mean": float,
    "data.std": float,
    "model.arch": str,
}
# What may differ when a run is repeated in its folder: none of it decides what is computed.
FREE_KEYS = ("run.out", "run.device", "run.compile", "run.timeout", "cache", "log.")
FREE_KEYS += ("data.workers", "data.insist")
# Above 0 where a script has them.
POSITIVE = ("optim.steps", "optim.batch_size", "optim.lr", "optim.encoder_lr_factor", "eval.every")
PHOTOMETRIC = ("brightness", "contrast", "gamma", "noise")


def parse_arguments(
    description: str, defaults: str, argv: list[str] | None = None, predicts: bool = True
) -> argparse.Namespace:
    """predicts: whether the script takes --predict and --out."""
    parser = settings_parser(description, defaults)
    if predicts:
        parser.add_argument("--predict", metavar="INPUT", help="a slice, a NIfTI volume, or a folder of such")
        parser.add_argument("--out", metavar="DIR", help="where --predict writes")
    parser.add_argument("--compare", metavar="DIR", nargs="+", help="print several runs in one table")
    return parser.parse_intermixed_args(argv)


def check_common(cfg: Config) -> None:
    """What is impossible of the common settings, and of those in model, optim and eval that a script has,
    whatever the data is; raises ConfigError."""
    own = cfg.flat()
    cfg.check_choice("run.device", "auto", "cpu", "cuda")
    cfg.check_choice("run.precision", "auto", "fp32", "bf16")
    cfg.check_positive("label_fraction", "run.timeout_minutes", "log.every")
    cfg.check_positive(*(name for name in POSITIVE if name in own))
    cfg.check_fraction("label_fraction", "augment.flip")
    cfg.check("seed", 0 <= cfg.seed < 2**31, "0 to 2147483647")
    cfg.check_not_negative("data.workers", *(f"augment.{n}" for n in PHOTOMETRIC))
    if "optim.weight_decay" in own:
        cfg.check_not_negative("optim.weight_decay")
    cfg.check_range("augment.scale")
    cfg.check("augment.scale", cfg.augment.scale[0] > 0, "[low, high], both above 0")
    cfg.check("data.size", cfg.data.size is None or 0 < cfg.data.size <= 8192, "1 to 8192 px, or null")
    cfg.check("model.in_channels", own.get("model.in_channels", 1) in (1, 3), "1 or 3")
    cfg.check("data.neighbours", cfg.data.neighbours in (None, 0, 1), "0 or 1, or null")
    for name in ("data.train", "data.test"):
        cfg.check(name, own[name] != "", "a list file")
    cfg.check("data.std", cfg.data.std is None or cfg.data.std > 0, "a value above 0, or null")
    if isinstance(cfg.data.window, list):
        cfg.check_range("data.window")
    else:
        cfg.check("data.window", cfg.data.window in (None, "auto"), "[low, high], auto or null")
    if isinstance(cfg.data.classes, int):
        cfg.check("data.classes", 2 <= cfg.data.classes <= 255, "2 to 255, the background included")


def check_cache(cfg: Config) -> None:
    if isinstance(cfg.cache, bool):  # YAML reads on and off as true and false
        cfg["cache"] = "on" if cfg.cache else "off"
    cfg.check_choice("cache", "auto", "on", "off")
    cfg.check_positive("cache_gb")
