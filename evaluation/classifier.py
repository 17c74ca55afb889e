"""An encoder with a linear head on its pooled features, all of it trained: how it is built, kept and used."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ConfigError
from engine.files import written_whole
from engine.process import Process, progress
from evaluation.batches import Batches
from models import Encoder
from weights import WeightsError, fits, read_weights


class Classifier(nn.Module):
    """Images (N, C, H, W) -> logits (N, K) by a linear layer on the mean of layer4."""

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.channels["layer4"], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)["layer4"].mean((2, 3)))


def classification_loss(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy; of several labels the binary one, mean over classes."""
    if kind == "single":
        return F.cross_entropy(logits.float(), targets)
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def save_classifier(path: Path, model: Classifier) -> None:
    with written_whole(path) as file:
        torch.save(model.state_dict(), file)


def load_classifier(path: Path, model: Classifier) -> None:
    """Raises ConfigError if there is none, WeightsError if it does not fit."""
    if not path.is_file():
        raise ConfigError(f"run.out: no trained model in {path.parent} (model.pth)")
    state = read_weights(path)
    if not fits(state, model.state_dict()):
        raise WeightsError(f"{path}: not a model of this evaluation, or damaged")
    model.load_state_dict(state)


@torch.no_grad()
def scores_of(model: Classifier, batches: Batches, process: Process, desc: str) -> np.ndarray:
    """Logits (N, K) of all slices, which are divided among the processes; on each of them."""
    model.eval()
    own = batches.in_order()[process.rank :: process.world]
    found = []
    for inputs in progress(process, desc, batches.inputs_of(own), len(own)):
        with process.autocast():
            found.append(model(inputs).float().cpu())
    scores = torch.empty(len(batches), model.head.out_features)
    for plan, parts in zip(process.gather(own), process.gather(found)):
        for rows, part in zip(plan, parts):
            scores[rows] = part
    return scores.numpy()
