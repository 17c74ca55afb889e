"""A network of 0.7 million parameters under the name "tiny": for tests of a run, whatever its network.

python tests/tiny.py train_moco.py --config ...      a script that knows it too
"""

import runpy
import sys
from pathlib import Path

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

PROJECT = Path(__file__).resolve().parent.parent


class TinyResNet(ResNet):
    """A quarter of the channels in each layer."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 4, *args, **kwargs)


def tiny_resnet():
    """One as its weights are exported: of one channel, ending in its pooled features."""
    model = TinyResNet(BasicBlock, [2, 2, 2, 2])
    model.conv1, model.fc = nn.Conv2d(1, 64, 7, 2, 3, bias=False), nn.Identity()
    return model


def register():
    import models

    models.ARCHITECTURES["tiny"] = (TinyResNet, BasicBlock, [2, 2, 2, 2])


if __name__ == "__main__":
    sys.path[0] = str(PROJECT)
    register()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(PROJECT / sys.argv[0]), run_name="__main__")
