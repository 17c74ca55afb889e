"""evaluation/segmenter.py: batches that are kept, windows over a slice, what does not fit into memory."""

import pytest
import torch

import data
import eval_seg
from ct.slices import DataError
from engine.config import load_config
from engine.process import Process
from evaluation import segmenter
from evaluation.batches import Batches


def test_kept_batches_are_the_computed_ones(phantom, tmp_path):
    """Values of two bytes too, from files that have no name while they are used."""
    dataset = data.SegmentationDataset(phantom, "train.txt")
    cfg = load_config(eval_seg.DEFAULTS, None, ["data.workers=0", "optim.batch_size=4"], eval_seg.NULLABLE)
    process = Process(0, 1, torch.device("cpu"), "fp32")
    for dtype in (torch.float32, torch.bfloat16):
        batches = Batches(
            dataset, [5, 3, 9, 0, 7], lambda x, dtype=dtype: x[..., ::8].to(dtype), cfg, process
        )
        plan = [[4, 0, 4], [2]]
        computed = list(batches.of(plan))
        batches.keep("features", tmp_path)
        assert not list(tmp_path.iterdir())
        for (inputs, masks), (expected, expected_masks) in zip(batches.of(plan), computed, strict=True):
            assert torch.equal(inputs, expected) and inputs.dtype == dtype
            assert torch.equal(masks, expected_masks)


class Smooth(torch.nn.Module):
    """A model whose logits depend on the pixel alone, and that runs out of memory above `limit` pixels."""

    def __init__(self, limit=10**9):
        super().__init__()
        self.limit, self.sizes = limit, []

    def forward(self, images):
        self.sizes.append(tuple(images.shape))
        if images[:, 0].numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat([images, 2 * images, images.square()], dim=1)


@pytest.mark.parametrize("size", [(96, 96), (100, 70), (64, 200)])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.75])
def test_windows_cover_every_pixel_and_average_to_the_same(size, overlap):
    images, model = torch.randn(2, 1, *size), Smooth()
    logits = segmenter.segmentation_logits(model, images, size, 64, overlap)
    torch.testing.assert_close(logits, Smooth()(images))
    assert all(max(shape[2:]) <= 64 for shape in model.sizes) and len(model.sizes) > 1
    starts = segmenter.window_starts(size[1], 64, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, size[1] - 64)
    assert all(b - a <= max(1, 64 * (1 - overlap)) + 0.5 for a, b in zip(starts, starts[1:]))


def test_what_does_not_fit_into_memory_is_divided():
    images, model = torch.randn(4, 1, 256, 256), Smooth(limit=130**2)
    logits = segmenter.segmentation_logits(model, images, (256, 256), None, 0.5)
    torch.testing.assert_close(logits, Smooth()(images))
    assert model.sizes[-1] == (1, 1, 128, 128)
    with pytest.raises(DataError, match="no memory for a slice of 256 x 256 px"):
        segmenter.segmentation_logits(Smooth(limit=100), images, (256, 256), None, 0.5)
