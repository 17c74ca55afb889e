"""models.py: the encoder against torchvision, MoCo against a naive re-implementation, weights in and out."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from every_method import training_batches
from torch import nn

from losses import matched_points, seeded
from moco import GlobalHead, MoCo
from models import DeepLabV3Plus, Encoder, LinearDecoder, SplitBatchNorm2d
from weights import WeightsError, load_encoder_weights


def torchvision_resnet(arch, in_channels=1):
    """A torchvision ResNet that ends in its pooled features."""
    model = getattr(torchvision.models, arch)(weights=None)
    model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    model.fc = nn.Identity()
    return model.eval()


def trunk_map(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


def randomise_norms(encoder):
    """Norms as after training: with affine parameters and running statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    for p in encoder.parameters():
        if p.dim() == 1:
            p.data.copy_(0.5 + torch.rand(p.shape, generator=generator))
    encoder.train()
    for _ in range(3):
        encoder(1 + 2 * torch.randn(4, encoder.in_channels, 64, 64, generator=generator))
    return encoder.eval()


# ---- Encoder ----


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("whitening", ["none", "zca", "iternorm"])
def test_exported_weights_compute_the_same_in_torchvision(arch, whitening):
    torch.manual_seed(0)
    encoder = randomise_norms(Encoder(arch, whitening=whitening))
    model = torchvision_resnet(arch)
    model.load_state_dict(encoder.export_state_dict(), strict=True)
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        ours, theirs = encoder(x)["layer4"], trunk_map(model, x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_dilated_map_contains_the_strided_one(arch):
    torch.manual_seed(0)
    encoder = randomise_norms(Encoder(arch))
    x = torch.randn(1, 1, 96, 96)
    with torch.no_grad():
        strided = encoder(x)["layer4"]
        for stride in (16, 8):
            encoder.set_output_stride(stride)
            dilated = encoder(x)["layer4"]
            step = 32 // stride
            assert dilated.shape[-1] == 96 // stride
            torch.testing.assert_close(dilated[:, :, ::step, ::step], strided, atol=1e-4, rtol=1e-4)
        encoder.set_output_stride(32)
        torch.testing.assert_close(encoder(x)["layer4"], strided)


def test_dilation_is_torchvisions():
    torch.manual_seed(0)
    encoder = Encoder("resnet50", in_channels=3, output_stride=8).eval()
    model = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True]).eval()
    model.load_state_dict(encoder.export_state_dict(), strict=False)
    x = torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)["layer4"], trunk_map(model, x))


def test_layers_and_channels():
    encoder = Encoder("resnet50").eval()
    assert encoder.channels == {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
    assert Encoder("resnet34").channels["layer4"] == 512
    whole, half = Encoder("resnet26"), Encoder("resnet26_half")
    assert half.channels == {name: channels // 2 for name, channels in whole.channels.items()}
    assert [p.dim() for p in half.parameters()] == [p.dim() for p in whole.parameters()]
    maps = encoder(torch.randn(1, 1, 65, 47), ("layer1", "layer3"))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "layer1": (1, 256, 17, 12),
        "layer3": (1, 1024, 5, 3),
    }


def test_encoder_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="resnet18, resnet26"):
        Encoder("resnet19")
    with pytest.raises(ValueError, match="output stride"):
        Encoder("resnet18", output_stride=4)
    with pytest.raises(ValueError, match="iternorm"):
        Encoder("resnet50", whitening="zca", group_size=0)
    Encoder("resnet50", whitening="iternorm", group_size=0)


def test_split_batchnorm_equals_one_batchnorm_per_sub_batch():
    torch.manual_seed(0)
    split, plain = SplitBatchNorm2d(3), nn.BatchNorm2d(3)
    split.split = 4
    x = torch.randn(12, 3, 5, 5) * 2 + 1
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.testing.assert_close(split(x), expected)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(dim=1) for part in x.split(4)])
    torch.testing.assert_close(split.running_var, 0.9 + 0.1 * variances.mean(dim=0))
    assert split(torch.randn(6, 3, 5, 5)).shape == (6, 3, 5, 5)  # not divisible: one part of six


# ---- MoCo ----


class NaiveMoCo:
    """The same algorithm, image by image and sub-batch by sub-batch, with a Python list for a queue."""

    def __init__(self, moco, lr):
        self.query, self.key = copy.deepcopy(moco.query), copy.deepcopy(moco.key)
        for module in (*self.query.modules(), *self.key.modules()):
            if isinstance(module, SplitBatchNorm2d):
                module.split = 0
        self.queue = list(F.normalize(moco.queue.T, dim=1))
        self.lr, self.step = lr, 0

    def encode(self, branch, views, boxes, sub_batch):
        parts = [branch(views[i : i + sub_batch], boxes[i : i + sub_batch]) for i in range(0, 8, sub_batch)]
        return torch.cat([z for z, _ in parts]), torch.cat([r for _, r in parts])

    def train_step(self, query_view, key_view, query_box, key_box):
        query_points, key_points, keep = matched_points(query_box, key_box, query_view.shape[2:], 32, 3)
        order = torch.randperm(8, generator=seeded("keys", 5, self.step))
        z_key, r_key = [None] * 8, [None] * 8
        with torch.no_grad():
            z, r = self.encode(self.key, key_view[order], key_points[order], 4)
        for place, sample in enumerate(order.tolist()):
            z_key[sample], r_key[sample] = F.normalize(z[place], dim=0), F.normalize(r[place], dim=1)
        z_query, r_query = self.encode(self.query, query_view, query_points, 4)

        losses, local = [], []
        for i in range(8):
            z = F.normalize(z_query[i], dim=0)
            scores = torch.stack([z @ z_key[i], *(z @ k for k in self.queue)]) / 0.2
            losses.append(torch.logsumexp(scores, 0) - scores[0])
            for j in range(9 if keep[i] else 0):
                r = F.normalize(r_query[i, j], dim=0)
                scores = torch.stack([r @ other for other in r_key[i]]) / 0.2
                local.append(torch.logsumexp(scores, 0) - scores[j])
        loss = torch.stack(losses).mean() + 0.5 * torch.stack(local).mean()
        for p in self.query.parameters():
            p.grad = None
        loss.backward()
        for p in self.query.parameters():
            p.data -= self.lr * p.grad
        for k, q in zip(self.key.parameters(), self.query.parameters()):
            k.data = 0.9 * k.data + 0.1 * q.data
        for i in range(8):
            self.queue[(8 * self.step + i) % 20] = z_key[i]
        self.step += 1
        return float(loss.detach())


def test_moco_equals_a_naive_re_implementation():
    torch.manual_seed(0)
    local = {"match": "overlap", "grid": 3}
    moco = MoCo(
        Encoder("tiny"), dim=16, queue_size=20, momentum=0.9, local=local, bn_split=4, seed=5
    ).double()
    moco.queue = F.normalize(moco.queue, dim=0)  # drawn in float32: unit vectors to its precision only
    naive = NaiveMoCo(moco, lr=0.01)
    optimizer = torch.optim.SGD(moco.query.parameters(), lr=0.01)
    for batch in training_batches(4):  # 32 keys: the queue of 20 wraps around
        views, boxes = batch[:2], batch[2:]
        targets = moco.targets(views, boxes)
        terms = moco(views, boxes, targets)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        moco.after_step(targets)
        assert terms["loss"].item() == pytest.approx(naive.train_step(*batch), rel=1e-9)
        torch.testing.assert_close(moco.queue, torch.stack(naive.queue, dim=1))
        newest = [naive.queue[moco.queue_pointer - 1 - i] for i in range(8)]
        cosines = [(a @ b).item() for i, a in enumerate(newest) for b in newest[:i]]
        assert terms["similarity"].item() == pytest.approx(sum(cosines) / 28, rel=1e-9)
    for ours, theirs in zip(moco.parameters(), [*naive.query.parameters(), *naive.key.parameters()]):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_accumulated_parts_equal_one_batch(negatives):
    torch.manual_seed(0)
    local = {"negatives": negatives}
    whole = MoCo(Encoder("tiny"), dim=16, queue_size=16, local=local, bn_split=4).double()
    parts = copy.deepcopy(whole)
    ((*views, box1, box2),) = training_batches(1)
    targets = whole.targets(views, [box1, box2])
    whole(views, [box1, box2], targets)["loss"].backward()
    whole.after_step(targets)
    targets = parts.targets(views, [box1, box2], parts=2)
    for rows in (slice(0, 4), slice(4, 8)):
        some = [view[rows] for view in views], [box1[rows], box2[rows]]
        (parts(*some, targets.part(rows))["loss"] / 2).backward()
    parts.after_step(targets)
    for ours, theirs in zip(parts.query.parameters(), whole.query.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(parts.queue, whole.queue)
    torch.testing.assert_close(list(parts.key.parameters()), list(whole.key.parameters()))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    torch.manual_seed(0)
    moco = MoCo(Encoder("tiny"), dim=16, queue_size=16, local={"weight": 2}, bn_split=4, weight=0.1)
    (*views, box1, box2) = next(training_batches(1))
    terms = moco.double()(views, [box1, box2])
    torch.testing.assert_close(terms["loss"], 0.1 * terms["global"] + 2 * terms["local"])


def test_evaluation_changes_nothing():
    torch.manual_seed(0)
    moco = MoCo(Encoder("tiny"), dim=8, queue_size=16).eval()
    moco.query.projector[0].weight.data += 1  # something that a momentum update would carry over
    before = copy.deepcopy(moco.state_dict())
    views = list(torch.randn(2, 4, 1, 64, 64))
    targets = moco.targets(views)
    moco(views, None, targets)
    moco.after_step(targets)
    after = moco.state_dict()
    assert after.pop("_extra_state") == before.pop("_extra_state")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_moco_state_survives_saving(tmp_path):
    torch.manual_seed(0)
    moco = MoCo(Encoder("tiny"), dim=8, queue_size=20, bn_split=0)
    for _ in range(3):
        moco.after_step(moco.targets(torch.randn(2, 8, 1, 32, 32)))
    torch.save(moco.state_dict(), tmp_path / "moco.pth")
    other = MoCo(Encoder("tiny"), dim=8, queue_size=20, bn_split=0)
    other.load_state_dict(torch.load(tmp_path / "moco.pth", weights_only=True))
    assert (other.queue_pointer, other.step) == (24 % 20, 3)
    views = [torch.randn(8, 1, 32, 32)] * 2
    torch.testing.assert_close(moco(views), other(views))


class ProbeEncoder(nn.Module):
    """Shows nothing of an image but what BatchNorm makes of a pixel that is 0 in every image."""

    channels = {"layer4": 16}

    def __init__(self):
        super().__init__()
        self.norm = SplitBatchNorm2d(16, affine=True)

    def forward(self, x, layers):
        return {"layer4": self.norm(x)[:, :, :1, :1]}


@pytest.mark.parametrize(
    ("split", "permuted", "leaks"), [(0, True, True), (8, False, True), (8, True, False)]
)
def test_batch_statistics_reveal_the_positive_unless_split_and_permuted(split, permuted, leaks):
    """All images look the same to this encoder; only their batches differ. So any accuracy is a leak."""
    torch.manual_seed(0)
    moco = MoCo(ProbeEncoder(), dim=16, queue_size=128, bn_split=split)
    moco.query.projector = moco.key.projector = GlobalHead()
    if not permuted:
        moco._key_order = torch.arange
    accuracy = []
    for _ in range(20):
        view = torch.randn(64, 16, 1, 1) + 0.3 * torch.randn(64, 16, 4, 4)
        view[:, :, 0, 0] = 0
        targets = moco.targets([view, view])
        accuracy.append(moco([view, view], None, targets)["accuracy"].item())
        moco.after_step(targets)
    recognised = sum(accuracy[5:]) / 15
    assert recognised > 0.95 if leaks else recognised < 0.4  # a quarter: sub-batches that share samples


def test_moco_refuses_what_cannot_work():
    encoder, views = Encoder("tiny"), torch.randn(2, 8, 1, 32, 32)
    with pytest.raises(ValueError, match="queue"):
        moco = MoCo(encoder, queue_size=4)
        moco.after_step(moco.targets(views))
    with pytest.raises(ValueError, match="boxes"):
        MoCo(encoder, queue_size=8, local={})(views)
    with pytest.raises(ValueError, match="matsch"):
        MoCo(encoder, local={"matsch": "grid"})
    with pytest.raises(ValueError, match="negatives"):
        MoCo(encoder, local={"negatives": "all"})
    with pytest.raises(ValueError, match="bn3"):
        MoCo(encoder, decorrelation={"method": "zca", "position": "bn3"})


def test_output_whitening_stays_outside_the_encoder():
    torch.manual_seed(0)
    encoder = Encoder("resnet18")
    names = set(encoder.state_dict())
    moco = MoCo(encoder, dim=8, queue_size=16, decorrelation={"method": "zca", "group_size": 32}, local={})
    (*views, box1, box2) = (x.float() for x in next(training_batches(1)))
    terms = moco(views, [box1, box2])
    assert set(terms) == {"loss", "global", "local", "accuracy", "similarity"}
    assert set(moco.query.encoder.state_dict()) == names == set(encoder.export_state_dict())
    assert moco.query.decorrelation.running_cov.shape == (16, 32, 32)


# ---- Decoders ----


def test_deeplab_has_the_published_number_of_parameters():
    model = DeepLabV3Plus(Encoder("resnet50", output_stride=8), 14)
    assert sum(p.numel() for p in model.parameters()) == 40_344_110


@pytest.mark.parametrize("size", [(65, 97), (64, 64), (33, 70)])
def test_decoders_answer_at_the_input_size(size):
    encoder = Encoder("resnet18", output_stride=8)
    model = DeepLabV3Plus(encoder, 5).eval()
    assert [b[0].dilation for b in model.aspp.branches] == [(1, 1), (12, 12), (24, 24), (36, 36)]
    x = torch.randn(2, 1, *size)
    assert model(x).shape == (2, 5, *size)
    decoder = LinearDecoder(512, 5)
    features = encoder(x)["layer4"]
    assert decoder(features, size).shape == (2, 5, *size)
    assert decoder(features).shape == (2, 5, *features.shape[2:])


def test_linear_decoder_is_a_normalised_linear_map():
    torch.manual_seed(0)
    decoder = LinearDecoder(6, 3)
    assert [tuple(p.shape) for p in decoder.parameters()] == [(3, 6, 1, 1), (3,)]
    features = torch.randn(4, 6, 5, 5) * 3 + 2
    mean, std = features.mean(dim=(0, 2, 3)), features.std(dim=(0, 2, 3), correction=0)
    flat = ((features - mean[:, None, None]) / std[:, None, None]).movedim(1, -1)
    expected = flat @ decoder.classifier.weight[:, :, 0, 0].T + decoder.classifier.bias
    torch.testing.assert_close(decoder(features), expected.movedim(-1, 1), atol=1e-4, rtol=1e-4)


# ---- Weights in ----


def test_torchvision_weights_load_with_the_stem_summed(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    encoder = Encoder("resnet18").eval()
    report = load_encoder_weights(encoder, tmp_path / "resnet18.pth")
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)["layer4"], trunk_map(model, x.expand(-1, 3, -1, -1)))
    assert report.left_out == ["fc.weight", "fc.bias"]
    assert "\n" not in str(report) and "summed" in str(report)


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("module.encoder_q.", lambda tensors: {"epoch": 200, "arch": "resnet18", "state_dict": tensors}),
        ("backbone.", lambda tensors: {"meta": {}, "state_dict": tensors}),
        (
            "_feature_blocks.",
            lambda tensors: {"classy_state_dict": {"base_model": {"model": {"trunk": tensors}}}},
        ),
        ("", lambda tensors: tensors),
    ],
)
def test_published_layouts_are_recognised(tmp_path, prefix, wrap):
    weights = Encoder("resnet18").export_state_dict()
    tensors = (
        {"module.encoder_k." + name: torch.zeros_like(v) for name, v in weights.items()} if prefix else {}
    )
    tensors |= {prefix + name: value for name, value in weights.items()} | {"head.fc.weight": torch.zeros(2)}
    torch.save(wrap(tensors), tmp_path / "file.pth")
    encoder = Encoder("resnet18")
    report = load_encoder_weights(encoder, tmp_path / "file.pth")
    assert report.prefix == prefix
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in weights.items())


def test_plain_weights_load_into_a_whitened_encoder(tmp_path):
    torch.manual_seed(0)
    plain = randomise_norms(Encoder("resnet18"))
    torch.save(plain.export_state_dict(), tmp_path / "plain.pth")
    for method in ("zca", "iternorm"):
        whitened = Encoder("resnet18", whitening=method, eps=1e-5).eval()
        load_encoder_weights(whitened, tmp_path / "plain.pth")
        x = torch.randn(1, 1, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(whitened(x)["layer4"], plain(x)["layer4"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 8])
def test_a_published_iternorm_is_folded_or_taken_over(tmp_path, groups):
    """In the shapes of its authors' code, as mmselfsup checkpoints of the paper have them."""
    torch.manual_seed(0)
    source = randomise_norms(Encoder("resnet18", whitening="iternorm", group_size=512 // groups)).eval()
    name = source.last_norm
    matrix = torch.randn(groups, 512 // groups, 512 // groups) / 60
    state = source.state_dict() | {
        f"{name}.running_wm": matrix + matrix.mT,
        f"{name}.running_mean": torch.randn(groups, 512 // groups),
        f"{name}.weight": torch.rand(512),
    }
    source.load_state_dict(state)
    published = {f"backbone.{key}": value for key, value in state.items()}
    for key in ("weight", "bias"):
        published[f"backbone.{name}.{key}"] = state[f"{name}.{key}"].view(1, -1, 1, 1)
    published[f"backbone.{name}.running_mean"] = state[f"{name}.running_mean"][..., None]
    torch.save({"meta": {}, "state_dict": published}, tmp_path / "paper.pth")
    x = torch.randn(2, 1, 64, 64)
    same = Encoder("resnet18", whitening="iternorm", group_size=512 // groups)
    for encoder in (same, Encoder("resnet18"), Encoder("resnet18", whitening="zca", eps=1e-9)):
        report = load_encoder_weights(encoder.eval(), tmp_path / "paper.pth")
        assert report.left_out == [] and ("folded" in report.note) == (encoder is not same)
        with torch.no_grad():
            torch.testing.assert_close(encoder(x)["layer4"], source(x)["layer4"], atol=1e-4, rtol=1e-4)


class Evil:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_unusable_weights_are_one_line_and_change_nothing(tmp_path, capsys):
    encoder = Encoder("resnet18")
    before = copy.deepcopy(encoder.state_dict())
    torch.save(Encoder("resnet34").export_state_dict(), tmp_path / "other.pth")
    torch.save(Encoder("resnet50").export_state_dict(), tmp_path / "wider.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    stem = {"stem.0.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}
    torch.save(stem, tmp_path / "deep.pth")
    names = ["other", "wider", "foreign", "evil", "short", "text", "deep", "missing"]
    for name in names:
        with pytest.raises(WeightsError) as error:
            load_encoder_weights(encoder, tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value) and f"{name}.pth" in str(error.value)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    assert capsys.readouterr().out == ""
