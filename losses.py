"""The method's mathematics: contrastive losses, matched regions, whitening, and measures of collapse.

Everything here is plain tensors in, tensors out, and needs only torch, so the file can be copied alone:

    info_nce, local_info_nce        MoCo's loss and its version for the regions of an image, in plain form
    queue_nce, local_nce_per_image  the same as training uses them: of unit vectors, and for each image
    cosines, nt_xent, cosine_distance, sinkhorn, swapped_prediction, barlow_twins, vicreg, nearest_pairs,
    propagate, pixel_agreement, patch_reconstruction    the losses of the other methods (methods.py)
    matched_points, sample_regions  where the regions of two crops lie, and their feature vectors
    ZCAWhitening, IterNorm          feature decorrelation (built on inverse_sqrt)
    singular_values, effective_rank how far features have collapsed
    segmentation_loss, dice_loss    cross entropy and soft Dice for the evaluation

Losses, places and whitening are computed in float32 (or float64, if given that) also under autocast.
"""

import functools
import hashlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Contrastive losses --------------------------------------------------------------------------


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE of each query against its own key (positive) and all keys of the queue (negatives).

    MoCo, arXiv 1911.05722, equation 1.

    Args:
        query: (N, D), any scale: normalised here.
        key: (N, D), the other view of the same images.
        queue: (D, K), keys of earlier batches as columns.

    Returns:
        The scalar mean over the N queries.
    """
    logits = contrastive_logits(query, key, queue, temperature)
    return nce_from_logits(logits).mean()


def contrastive_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Cosine similarities over the temperature, (N, 1 + K): the positive in column 0, then the queue."""
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(at_least_float32(query), dim=1)
        key = F.normalize(at_least_float32(key), dim=1)
        queue = F.normalize(at_least_float32(queue), dim=0)
        positive = (query * key).sum(dim=1, keepdim=True)  # (N, 1)
        negative = query @ queue  # (N, K)
        return torch.cat([positive, negative], dim=1) / temperature


def nce_from_logits(logits: Tensor) -> Tensor:
    """Cross entropy with the positive in column 0: (..., 1 + K) -> (...)."""
    return torch.logsumexp(logits, dim=-1) - logits[..., 0]


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query as in `info_nce`, where keys and queue are unit vectors already.

    Neither a normalised copy of the queue nor a table of (N, 1 + K) logits is made, and the queue may change
    before the backward pass.

    Args:
        query: (N, D), any scale.
        key: (N, D), unit vectors, without gradient.
        queue: (D, K), unit vectors as columns.

    Returns:
        The losses (N,), and whether each query is nearer to its key than to all of the queue, (N,) bool.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(at_least_float32(query), dim=1) / temperature
        positive = (query * key).sum(dim=1)  # (N,)
        negative, largest = LogSumExp.apply(query, queue)  # (N,) each
        return torch.logaddexp(positive, negative) - positive, positive > largest


class LogSumExp(torch.autograd.Function):
    """log(sum(exp(query @ queue))) over the columns of the queue, and their largest product: (N,) each.

    The gradient, the mean of the columns weighted by their softmax, is computed in the forward pass: to hold
    (N, D) until the backward pass takes less than to hold (N, K), and the queue is free to move on.
    """

    @staticmethod
    def forward(ctx, query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        products = query @ queue  # (N, K)
        largest = products.amax(dim=1, keepdim=True)
        powers = products.sub_(largest).exp_()
        total = powers.sum(dim=1, keepdim=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(powers @ queue.mT / total)
        largest = largest.squeeze(1)
        ctx.mark_non_differentiable(largest)
        return largest + total.squeeze(1).log(), largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        (mean,) = ctx.saved_tensors
        return grad[:, None] * mean, None


def local_info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float = 0.2,
    keep: Tensor | None = None,
    everyone: Tensor | None = None,
) -> Tensor:
    """InfoNCE between the regions of two views of one image, averaged over regions and images.

    Region r of the query has region r of the key as its positive; the other regions of the same key image
    are the negatives (arXiv 2402.14611, local feature learning), or all others of `everyone`.

    Args:
        query, key: (N, R, D), any scale: normalised here.
        keep: (N,) bool, the images that count; all if None.
        everyone: (M, R, D), the keys of a batch, these among them.

    Returns:
        The scalar mean over the kept images; 0 (with zero gradient) if none is kept.
    """
    per_image = local_nce_per_image(query, key, temperature, everyone)
    if keep is None:
        return per_image.mean()
    return torch.where(keep, per_image, 0).sum() / keep.sum().clamp(min=1)


def local_nce_per_image(
    query: Tensor, key: Tensor, temperature: float = 0.2, everyone: Tensor | None = None
) -> Tensor:
    """The local InfoNCE of each image, averaged over its regions: (N, R, D), (N, R, D) -> (N,)."""
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(at_least_float32(query), dim=2)
        key = F.normalize(at_least_float32(key), dim=2)
        if everyone is None:
            compared = key.mT  # (N, D, R): the regions of the same image
        else:
            compared = F.normalize(at_least_float32(everyone), dim=2).flatten(0, 1).mT  # (D, M R)
        logits = query @ compared / temperature  # (N, R, R or M R): the positive is one of the columns
        positive = (query * key).sum(dim=2) / temperature  # (N, R)
        return (torch.logsumexp(logits, dim=2) - positive).mean(dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- The losses of other methods: batches are global ones (gather), in rows ----------------------


def full_precision(function):
    """Compute in float32 (float64 stays) also under autocast, whatever type the tensors have."""

    @functools.wraps(function)
    def computed(*values, **named):
        (device, *_) = {x.device.type for x in (*values, *named.values()) if isinstance(x, Tensor)}
        with torch.autocast(device, enabled=False):
            return function(*map(raised, values), **{name: raised(x) for name, x in named.items()})

    return computed


def raised(x):
    """A tensor of floats in float32 at least; anything else as it is."""
    return at_least_float32(x) if isinstance(x, Tensor) and x.is_floating_point() else x


@full_precision
def cosines(x: Tensor, units: Tensor) -> Tensor:
    """Of vectors (..., P, D), any scale, and unit vectors (..., Q, D): (..., P, Q)."""
    return F.normalize(x, dim=-1) @ units.mT


@full_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent (SimCLR, arXiv 2002.05709, equation 1): of 2N samples, each has one positive, its other view,
    and 2N - 2 negatives. z1, z2: (N, D), any scale -> scalar, the mean over all 2N."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2N, D)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    own = torch.arange(len(z), device=z.device)
    return F.cross_entropy(logits, own.roll(len(z1)))


@full_precision
def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over the rows of (N, D) and (N, D): half of BYOL's loss of unit vectors
    (arXiv 2006.07733, equation 2), SimSiam's plus 1 (arXiv 2011.10566, equation 1)."""
    return 1 - F.cosine_similarity(prediction, target, dim=1).mean()


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Codes of a batch that use all prototypes alike (SwAV, arXiv 2006.09882, equation 3 and its algorithm).

    scores: (N, K), cosines of samples and prototypes -> (N, K), each row a distribution, the columns after
    the last of the alternating normalisations nearly equal in sum.
    """
    codes = (scores - scores.max()).div(epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0).clamp(min=torch.finfo(codes.dtype).tiny)  # of every prototype
        codes = codes / codes.sum(dim=1, keepdim=True)  # of every sample
    return codes


@full_precision
def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross entropy of one view's prototype scores (N, K) against another view's codes (N, K): SwAV,
    equation 2. Scalar mean."""
    return -(codes * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


@full_precision
def barlow_twins(z1: Tensor, z2: Tensor, weight: float = 0.0051) -> Tensor:
    """Barlow Twins (arXiv 2103.03230, equations 1 and 2): the cross-correlation matrix of the features of two
    views is pulled towards the identity; off the diagonal squares count `weight`.

    z1, z2: (N, D), any scale and mean -> scalar sum over the matrix. A constant feature, whose variance is
    that of rounding, correlates with none. (The authors' BatchNorm adds 1e-5 to all variances.)
    """
    z1, z2 = ((z - z.mean(dim=0)) * z.var(dim=0, correction=0).clamp(min=1e-8).rsqrt() for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)  # (D, D)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + weight * off_diagonal


@full_precision
def vicreg_terms(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of `vicreg`, not weighted: invariance, variance, covariance."""
    invariance = F.mse_loss(z1, z2)
    variance, covariance = 0, 0
    for z in (z1, z2):
        centred = z - z.mean(dim=-2, keepdim=True)  # (..., N, D)
        cov = centred.mT @ centred / (z.shape[-2] - 1)  # (..., D, D)
        variances = cov.diagonal(dim1=-2, dim2=-1)
        variance = variance + F.relu(1 - (variances + 1e-4).sqrt()).mean() / 2
        off_diagonal = cov.square().sum(dim=(-2, -1)) - variances.square().sum(dim=-1)
        covariance = covariance + off_diagonal.mean() / z.shape[-1]
    return invariance, variance, covariance


def vicreg(
    z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """VICReg (arXiv 2105.04906, equations 1 to 6): views agree, every feature has a standard deviation of 1
    or more over the batch (mean of both views), no two features covary (sum of both views).

    z1, z2: (N, D), N at least 2 -> scalar; (..., N, D): the mean over several batches.
    """
    terms = vicreg_terms(z1, z2)
    return invariance * terms[0] + variance * terms[1] + covariance * terms[2]


def nearest_pairs(distances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` positions with the nearest partners, in order, and those partners (VICRegL,
    arXiv 2210.01571, section 3.2).

    distances: (N, P, Q) of P positions of one view and Q of the other -> indices (N, count) and (N, count).
    """
    nearest, partner = distances.min(dim=2)  # (N, P)
    chosen = nearest.topk(min(count, nearest.shape[1]), dim=1, largest=False).indices.sort(dim=1).values
    return chosen, partner.gather(1, chosen)


def positions_at(x: Tensor, indices: Tensor) -> Tensor:
    """Vectors of some positions: (N, P, D) at (N, K) -> (N, K, D)."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))


@full_precision
def propagate(pixels: Tensor, transformed: Tensor, sharpness: float = 2.0) -> Tensor:
    """PixPro's pixel propagation (arXiv 2011.10043, equations 2 and 3), of unit vectors as in its code: each
    pixel becomes the sum of all transformed ones, weighted by their cosine with it to the power `sharpness`.

    pixels, transformed: (N, P, D), any scale -> (N, P, D).
    """
    units = F.normalize(pixels, dim=2)
    likeness = (units @ units.mT).clamp(min=0) ** sharpness  # (N, P, P)
    return likeness @ F.normalize(transformed, dim=2)


@full_precision
def pixel_agreement(y: Tensor, x: Tensor, positive: Tensor) -> Tensor:
    """PixPro's loss (arXiv 2011.10043, equation 4) of one direction: the mean of 1 - cosine over an image's
    positive pairs, 0 without any; then over images.

    y: (N, P, D) propagated pixels of a view; x: (N, Q, D) of the other one; positive: (N, P, Q) bool.
    """
    distances = 1 - cosines(y, F.normalize(x, dim=2))  # (N, P, Q)
    return (
        torch.where(positive, distances, 0).sum(dim=(1, 2)) / positive.sum(dim=(1, 2)).clamp(min=1)
    ).mean()


@full_precision
def patch_reconstruction(prediction: Tensor, image: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error in the masked cells, of an image normalised cell by cell (SparK, arXiv 2301.03580,
    section 3.3).

    prediction, image: (N, C, H, W); masked: (N, gh, gw) bool, cells of H / gh x W / gw px, one or more
    masked in all images together. A cell's values are divided by its standard deviation (unbiased).
    """
    (n, c), (gh, gw) = image.shape[:2], masked.shape[1:]

    def cells(x: Tensor) -> Tensor:  # (N, gh, gw, values)
        return x.view(n, c, gh, x.shape[2] // gh, gw, -1).permute(0, 2, 4, 3, 5, 1).flatten(3)

    target = cells(image)
    variance, mean = torch.var_mean(target, dim=3, keepdim=True)
    error = (cells(prediction) - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=3)
    return torch.where(masked, error, 0).sum() / masked.sum()


# ---- Matched regions: which points of two crops show the same anatomy ----------------------------


@full_precision
def matched_points(
    query_box: Tensor,
    key_box: Tensor,
    size: tuple[int, int],
    stride: int,
    grid: int = 4,
    match: str = "overlap",
    min_overlap: float = 0.15,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of grid x grid matched regions in two crops of the same slice.

    A box row is x0, y0, x1, y1 of the crop in the source slice, in [0, 1] from pixel edge to pixel edge,
    then 1 if the crop was mirrored left to right afterwards, else 0. Of a view that was also turned or
    sheared it goes on with the matrix a b c d, by which an offset (u, v) from the view's centre, in its sides
    and before it was mirrored, is (a u + b v, c u + d v) in sides of the box.

    match="overlap" (ours): the grid lies over the part of the slice that the feature maps of both crops span
    (`map_box`), so that region r is the same anatomy in both, and no region lies beyond the outermost
    positions of a map. Images where this part is narrower than `min_overlap` of a crop's side, in either
    direction and for either crop, are not kept.
    match="grid" (the paper's): the same cell of both views; the mirrored cell if only one is flipped. This is
    what "overlap" finds of two crops of the same place.

    Args:
        query_box, key_box: (N, 5), or (N, 9) with the matrix.
        size: (H, W) of the views, px.
        stride: px from one position of the feature map to the next.

    Returns:
        query_points, key_points: (N, R, 2), x and y in [0, 1] of each view as it was cropped and flipped,
            from pixel edge to pixel edge; R = grid * grid, row by row of the source slice.
        keep: (N,) bool.
    """
    if match == "grid":
        query_box, key_box = uncropped(query_box), uncropped(key_box)
    elif match != "overlap":
        raise ValueError(f"match must be 'grid' or 'overlap', not {match!r}")

    query_inside, key_inside = (map_box(box, size, stride) for box in (query_box, key_box))  # (N, 4) each
    low = torch.maximum(query_inside[:, :2], key_inside[:, :2])  # (N, 2): left, top of the intersection
    side = torch.minimum(query_inside[:, 2:], key_inside[:, 2:]) - low  # negative if they do not meet
    largest_crop = torch.maximum(box_side(query_box), box_side(key_box))
    keep = (side >= min_overlap * largest_crop).all(dim=1)
    cells = (torch.arange(grid, device=low.device, dtype=low.dtype) + 0.5) / grid
    in_slice = low[:, None] + row_by_row(cells, cells) * side.clamp(min=0)[:, None]  # (N, R, 2)
    return to_view(in_slice, query_box), to_view(in_slice, key_box), keep


def uncropped(box: Tensor) -> Tensor:
    """The box (N, 5) of a view of the whole slice that is mirrored where that of `box` (N, 5 or 9) is."""
    return torch.cat([torch.zeros_like(box[:, :2]), torch.ones_like(box[:, 2:4]), box[:, 4:5]], dim=1)


def map_box(box: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The part of the slice from the first position of a view's feature map to the last, (N, 4); of a turned
    or sheared crop (N, 9) the largest box of the crop's shape and this centre within it, cut to the slice."""
    ends = cell_centres(box, size, stride)[:, [0, -1]]  # (N, 2, 2)
    if box.shape[1] == 5:
        return torch.cat([ends.amin(dim=1), ends.amax(dim=1)], dim=1)
    height, width = (stride * ((side - 1) // stride) / side for side in size)  # of the map; the view's are 1
    across, down = inverse_matrix(box).abs().sum(dim=2).unbind(dim=1)  # of the whole box, in the view
    share = torch.minimum(width / across, height / down)  # (N,)
    centre, half = ends.mean(dim=1), share[:, None] * box_side(box) / 2
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, 1)


def inverse_matrix(box: Tensor) -> Tensor:
    """Of a turned or sheared crop (N, 9), (N, 2, 2): from offsets in the box to offsets in the view."""
    a, b, c, d = box[:, 5:].unbind(dim=1)
    return torch.stack([d, -b, -c, a], dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]


def to_view(points: Tensor, box: Tensor) -> Tensor:
    """Points of the source slice, (N, R, 2) in [0, 1], as seen in the crop `box`, flip included."""
    inside = (points - box[:, None, :2]) / box_side(box)[:, None]
    if box.shape[1] > 5:
        inside = (inside - 0.5) @ inverse_matrix(box).mT + 0.5
    return mirror(inside, box[:, 4])


def to_slice(points: Tensor, box: Tensor) -> Tensor:
    """The inverse of `to_view`."""
    inside = mirror(points, box[:, 4])  # a mirrored view runs from right to left
    if box.shape[1] > 5:
        inside = (inside - 0.5) @ box[:, 5:].view(-1, 2, 2).mT + 0.5
    return box[:, None, :2] + inside * box_side(box)[:, None]


@full_precision
def cell_centres(box: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Where the positions of a view's feature map lie in the source slice.

    Position i looks at the centre of pixel stride * i. Output j of each strided layer of a ResNet (7x7 with
    padding 3, 3x3 with padding 1 or its dilation, 1x1 without) is centred on its input 2 j, of all others on
    input j: strides multiply, and nothing is added. H px have ceil(H / stride) positions, so that the last of
    them is up to stride - 1 px before the last pixel.

    Args:
        box: (N, 5 or 9), the view's, see `matched_points`.
        size: (H, W) of the view, px.
        stride: px from one position to the next.

    Returns:
        (N, h w, 2), x and y in [0, 1], row by row of the view's map (h, w).
    """
    pixels = (torch.arange(0, side, stride, device=box.device, dtype=box.dtype) for side in size)
    y, x = ((pixel + 0.5) / side for pixel, side in zip(pixels, size))  # from pixel edge to pixel edge
    return to_slice(row_by_row(y, x).expand(len(box), -1, -1), box)


def row_by_row(y: Tensor, x: Tensor) -> Tensor:
    """All points of the rows y (h,) and columns x (w,), (h w, 2), x before y."""
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def box_side(box: Tensor) -> Tensor:
    return box[:, 2:4] - box[:, :2]


def mirror(points: Tensor, flip: Tensor) -> Tensor:
    """Mirror x of (N, R, 2) points where flip (N,) is 1."""
    x, y = points.unbind(dim=2)
    return torch.stack([torch.where(flip[:, None] > 0.5, 1 - x, x), y], dim=2)


@full_precision  # in bfloat16 a point is up to 1/512 of the view away from its place
def sample_regions(feature_map: Tensor, points: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Bilinear samples of a view's feature map between its positions, which lie where `cell_centres` says;
    beyond the outermost ones, of the nearest.

    Args:
        feature_map: (N, C, h, w).
        points: (N, R, 2), x and y in [0, 1] of the view, as `matched_points` gives them.
        size: (H, W) of the view, px.
        stride: px from one position to the next.

    Returns:
        (N, R, C).
    """
    (height, width), (h, w) = size, feature_map.shape[2:]
    x, y = points.unbind(dim=2)  # (N, R) each
    x, y = (x * width - 0.5) / stride, (y * height - 0.5) / stride  # in positions of the map
    locations = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], dim=2)  # where grid_sample has them
    sampled = F.grid_sample(
        feature_map,
        locations.to(feature_map.dtype)[:, None],  # (N, 1, R, 2)
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[:, :, 0].transpose(1, 2).contiguous()  # else a Linear copies its weight for each image


# ---- Feature decorrelation -----------------------------------------------------------------------


class InverseSqrt(torch.autograd.Function):
    """(S + eps I)^(-1/2) whose backward pass never divides by a difference of eigenvalues.

    With S = U diag(lambda) U^T and a_i = sqrt(lambda_i + eps), the Daleckii-Krein theorem gives
    dL/dS = U (K o (U^T G U)) U^T, where K_ij = (1/a_i - 1/a_j) / (lambda_i - lambda_j). That difference
    quotient equals -1 / (a_i a_j (a_i + a_j)), which is finite for simple, equal and zero eigenvalues.
    Differentiating through the eigenvectors instead gives NaN there (pytorch issue 76531).
    """

    @staticmethod
    def forward(ctx, cov: Tensor, eps: float) -> Tensor:
        cov = (cov + cov.mT) / 2
        finite = torch.isfinite(cov).flatten(-2).all(dim=-1)[..., None, None]
        identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, cov, identity))  # raises on NaN
        a = (eigenvalues.clamp(min=0) + eps).sqrt()
        ctx.save_for_backward(vectors, a)
        result = (vectors / a[..., None, :]) @ vectors.mT
        return torch.where(finite, result, torch.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        vectors, a = ctx.saved_tensors
        row, column = a[..., :, None], a[..., None, :]
        kernel = -1 / (row * column * (row + column))
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (kernel * inner) @ vectors.mT, None


def inverse_sqrt(cov: Tensor, eps: float) -> Tensor:
    """(cov + eps I)^(-1/2) of symmetric matrices (..., C, C), with a stable backward pass.

    Eigenvalues are clamped at 0 first. At least float32; a matrix with a non-finite entry gives NaN.
    """
    with torch.autocast(cov.device.type, enabled=False):
        return InverseSqrt.apply(at_least_float32(cov), eps)


class Whitening(nn.Module):
    """What ZCAWhitening and IterNorm share: groups, statistics, running averages and the affine map.

    Channels are whitened in groups of `group_size` neighbours (0, or more than there are: all at once).
    In training the statistics are those of the batch and all its positions, over all ranks of a process
    group if `sync`; in evaluation the running ones. Input and output (N, C) or (N, C, H, W), any float type.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 64,
        eps: float = 1e-3,
        momentum: float = 0.1,
        affine: bool = True,
        sync: bool = True,
    ):
        super().__init__()
        size = min(group_size, num_features) if group_size > 0 else num_features
        if num_features % size:
            raise ValueError(f"{num_features} channels do not divide into groups of {size}")
        self.num_features, self.group_size, self.num_groups = num_features, size, num_features // size
        self.eps, self.momentum, self.sync = eps, momentum, sync
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(self.num_groups, size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            last = x.movedim(1, -1)  # (N, C) or (N, H, W, C): a view of a channels_last tensor
            groups = at_least_float32(last).reshape(-1, self.num_groups, self.group_size)
            groups = groups.transpose(0, 1)  # (G, M, S): group, sample and position, channel
            if self.training:
                mean, cov, count = batch_moments(groups, self.sync)
                matrix = self.batch_matrix(mean, cov, count)
            else:
                mean, matrix = self.running_mean, self.running_matrix()
            white = (groups - mean[:, None]) @ matrix  # (G, M, S); the matrix is symmetric
            white = white.transpose(0, 1).reshape(last.shape).movedim(-1, 1)
            if self.weight is not None:
                shape = (1, -1) + (1,) * (x.dim() - 2)
                white = white * self.weight.view(shape) + self.bias.view(shape)
            return white.to(x.dtype)

    @torch.no_grad()
    def update_running(self, buffer: Tensor, value: Tensor) -> None:
        buffer.lerp_(value.to(buffer.dtype), self.momentum)

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_size={self.group_size}, eps={self.eps}, sync={self.sync}"


class ZCAWhitening(Whitening):
    """ZCA whitening by eigendecomposition (arXiv 1804.08450): y = (S + eps I)^(-1/2) (x - mean).

    Within a group the covariance of the output (before the affine map) is S (S + eps I)^(-1): the identity
    where eigenvalues are much larger than eps, zero in null directions, finite always. A group of one
    channel is batch normalisation.
    """

    def __init__(self, num_features, group_size=64, eps=1e-3, momentum=0.1, affine=True, sync=True):
        super().__init__(num_features, group_size, eps, momentum, affine, sync)
        self.register_buffer("running_cov", torch.eye(self.group_size).repeat(self.num_groups, 1, 1))

    def batch_matrix(self, mean: Tensor, cov: Tensor, count: Tensor) -> Tensor:
        self.update_running(self.running_mean, mean)
        self.update_running(
            self.running_cov, cov * count / (count - 1).clamp(min=1)
        )  # unbiased, as BatchNorm's
        return inverse_sqrt(cov, self.eps)

    def running_matrix(self) -> Tensor:
        return inverse_sqrt(self.running_cov, self.eps)


class IterNorm(Whitening):
    """Whitening by Newton-Schulz iterations (arXiv 1904.03441): matrix products only, no eigenvectors.

    After `iterations` steps only the larger eigenvalues have come near 1. The running average is that of
    the whitening matrix, as in the paper's own code.
    """

    def __init__(
        self, num_features, group_size=64, iterations=5, eps=1e-5, momentum=0.1, affine=True, sync=True
    ):
        super().__init__(num_features, group_size, eps, momentum, affine, sync)
        self.iterations = iterations
        self.register_buffer("running_wm", torch.eye(self.group_size).repeat(self.num_groups, 1, 1))

    def batch_matrix(self, mean: Tensor, cov: Tensor, count: Tensor) -> Tensor:
        matrix = newton_schulz(cov, self.eps, self.iterations)
        self.update_running(self.running_mean, mean)
        self.update_running(self.running_wm, matrix)
        return matrix

    def running_matrix(self) -> Tensor:
        return self.running_wm


def newton_schulz(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """Approximate (cov + eps I)^(-1/2) for (..., C, C): P <- (3 P - P^3 S) / 2 on the trace-normalised S."""
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    regular = cov + eps * identity
    trace = regular.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    normalised = regular / trace
    p = identity.expand_as(cov)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * (p @ p @ p) @ normalised
    return p / trace.sqrt()


def batch_moments(groups: Tensor, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (G, S) and covariance (G, S, S) of values (G, M, S) over M, and the count M.

    Over all ranks if `sync`. Two passes: the covariance is that of centred values, since E[xx] - mm cancels
    catastrophically.
    """
    count = groups.new_full((1,), groups.shape[1])
    total = groups.sum(dim=1)
    if sync and world_size() > 1:
        summed = SumOverRanks.apply(torch.cat([total.flatten(), count]))
        total, count = summed[:-1].view_as(total), summed[-1:].detach()
    mean = total / count
    centred = groups - mean[:, None]
    scatter = centred.transpose(1, 2) @ centred
    if sync and world_size() > 1:
        scatter = SumOverRanks.apply(scatter)
    return mean, scatter / count, count


# ---- Processes and seeds ---------------------------------------------------------------------------


class SumOverRanks(torch.autograd.Function):
    """Sum over all ranks; the gradient is the sum of their gradients, since each rank used the sum."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Gather(torch.autograd.Function):
    """The rows of all ranks. A rank's rows get the sum of the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x)
        ctx.count = len(x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[own_rows(ctx.count)]


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in their order, (n, ...) -> (N, ...), with gradient: of a loss that every rank
    computes of all rows, the mean of the ranks' gradients (DistributedDataParallel's) is the loss's own."""
    return Gather.apply(x) if world_size() > 1 else x


def own_rows(count: int) -> slice:
    """Which of the rows of all ranks are this one's, if each has `count`."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return slice(rank * count, (rank + 1) * count)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def seeded(*key) -> torch.Generator:
    """A CPU generator whose state is a hash of the key: independent streams for independent purposes."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---- Collapse, and the evaluation's losses --------------------------------------------------------


def singular_values(features: Tensor) -> Tensor:
    """Singular values of the centred features, (N, C) -> (min(N, C),) float64, largest first.

    From the smaller one of the Gram matrices, several times faster than svdvals; below 1e-8 of the largest
    value they are noise. All NaN if a feature is not finite.
    """
    features = features.detach().double()
    if not features.isfinite().all():
        return features.new_full((min(features.shape),), torch.nan)
    centred = features - features.mean(dim=0)
    gram = centred @ centred.mT if len(centred) < centred.shape[1] else centred.mT @ centred
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def effective_rank(features: Tensor) -> float:
    """exp(entropy of the singular values as a distribution): 0 for constant features, at most min(N - 1, C).

    RankMe (arXiv 2210.02885), with one change: features are centred first, so that a large common mean
    does not count as a dimension. Features (N, C).
    """
    return effective_rank_of(singular_values(features))


def effective_rank_of(values: Tensor) -> float:
    """Effective rank from singular values (K,)."""
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.exp(torch.special.entr(values / total).sum()))


def segmentation_loss(logits: Tensor, target: Tensor, ignore: int = 255) -> Tensor:
    """Mean cross entropy over the pixels that are not `ignore`; 0 if there are none.

    Args:
        logits: (N, K, H, W).
        target: (N, H, W) class indices.
    """
    target = target.long()
    loss = F.cross_entropy(logits.float(), target, ignore_index=ignore, reduction="sum")
    return loss / (target != ignore).sum().clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor, ignore: int = 255) -> Tensor:
    """1 - soft Dice (arXiv 1606.04797, without its squares), each class over the whole batch, mean over the
    classes that the target has, without the background (class 0); 0 if it has none.

    With p the probabilities: Dice = 2 sum(p of the class's pixels) / (sum(p) + number of the class's pixels).
    Pixels that are `ignore` count in no sum. A class that the target has not would have a Dice of 0 whatever
    its probabilities, so it is left out. Nothing is smoothed: a class that is there has a pixel or more.
    Arguments as `segmentation_loss` has them, whose sum with this one is the usual "Dice + cross entropy".
    """
    index = torch.arange(logits.shape[1], device=logits.device)[:, None, None]  # (K, 1, 1)
    truth = (target[:, None] == index) & (target != ignore)[:, None]  # (N, K, H, W)
    p = logits.float().softmax(dim=1) * (target != ignore)[:, None]
    both, pixels = (p * truth).sum(dim=(0, 2, 3)), truth.sum(dim=(0, 2, 3))  # (K,)
    there = pixels[1:] > 0
    missed = 1 - 2 * both[1:] / (p.sum(dim=(0, 2, 3)) + pixels)[1:].clamp(min=1)
    return (missed * there).sum() / there.sum().clamp(min=1)
