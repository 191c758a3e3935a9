"""Second moments of what a layer reads and should give, and the weights that fit them best.

A layer is seen as one matrix a group: g groups (1, but for grouped convolutions) of o outputs and k columns. Its m rows
are samples, tokens or output positions. A convolution's columns are in * kh * kw of its group, unfolded.
Moments are float64, summed up batch by batch from centred rows; no activations are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.repair.lockstep import Visit
from gsprune.structures.matrices import is_conv1d

POSITIONS = 200_000  # rows of a layer that are read, over all batches
OWN_PASS = "its output is not its weight times its input: it has a forward pass of its own"
ENTRIES = 2**24  # of the rows of a wide layer that are read at once
COLUMNS = 512  # columns of a Gram matrix that are computed at once
FLAT = 1e-3  # a smaller slope of a norm makes nothing up
_CONV = nn.modules.conv._ConvNd


@dataclass(eq=False)
class Moments:
    """Of rows x (m, g, k) and y (m, g, o): count, means, and sums of products of what differs from the means.

    >>> moments = Moments.none(1, 1, 1)
    >>> moments.add(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[2.0]], [[6.0]]]))
    >>> moments.n, moments.mean_y.item(), moments.xx.item(), moments.yx.item(), moments.yy.item()
    (2, 4.0, 2.0, 4.0, 8.0)
    """

    n: int
    mean_x: Tensor  # (g, k)
    mean_y: Tensor  # (g, o)
    xx: Tensor  # (g, k, k)
    yx: Tensor  # (g, o, k)
    yy: Tensor  # (g, o)

    @classmethod
    def none(cls, groups: int, columns: int, outputs: int, device: torch.device | None = None) -> Moments:
        """Of no rows."""
        zeros = [(groups, columns), (groups, outputs), (groups, columns, columns), (groups, outputs, columns)]
        tensors = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in (*zeros, (groups, outputs))]
        return cls(0, *tensors)

    def add(self, x: Tensor, y: Tensor) -> None:
        """More rows, of any floating type and device."""
        m = len(x)
        if m == 0:
            return
        work = _work(torch.promote_types(x.dtype, y.dtype), self.xx.device)
        x, y = (_double(rows, self.xx.device) for rows in (x, y))
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = ((rows - mean).transpose(0, 1).to(work) for rows, mean in ((x, mean_x), (y, mean_y)))  # (g, m, .)
        step_x, step_y, share = mean_x - self.mean_x, mean_y - self.mean_y, self.n * m / (self.n + m)
        self.xx.add_(_gram(x)).baddbmm_(share * step_x[:, :, None], step_x[:, None])
        self.yx.add_(_products(y, x)).baddbmm_(share * step_y[:, :, None], step_x[:, None])
        self.yy += y.double().square().sum(1) + share * step_y**2
        self.mean_x += step_x * (m / (self.n + m))
        self.mean_y += step_y * (m / (self.n + m))
        self.n += m

    @property
    def is_finite(self) -> bool:
        return bool(self.xx.isfinite().all() & self.yx.isfinite().all() & self.yy.isfinite().all())


def _products(y: Tensor, x: Tensor) -> Tensor:
    """Y^T X of each group, (g, m, o) and (g, m, k) -> (g, o, k)."""
    if x.shape[2] == y.shape[2] == 1:  # a norm's channels: many groups of one column
        return (y * x).sum(1, keepdim=True)
    return y.mT @ x


def _gram(x: Tensor) -> Tensor:
    """X^T X of each group, (g, m, k) -> (g, k, k); of blocks of columns those on and right of the diagonal.

    >>> _gram(torch.tensor([[[1.0, 2.0]]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]]]
    """
    width = x.shape[2]
    if width <= COLUMNS:
        return _products(x, x)
    found = x.new_empty(len(x), width, width)
    for start in range(0, width, COLUMNS):
        rows = slice(start, start + COLUMNS)
        found[:, rows, start:] = x[:, :, rows].mT @ x[:, :, start:]
        found[:, rows, :start] = found[:, :start, rows].mT
    return found


def _work(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a batch's products are computed in: float32 takes half the time on a CPU; a GPU may round it to less."""
    return torch.float64 if dtype == torch.float64 or device.type != "cpu" else torch.float32


def _double(rows: Tensor, device: torch.device) -> Tensor:
    return rows.to(device).double()  # to the CPU first: MPS has no float64


def solve(moments: Moments, prior: Tensor | None, damping: float, *, has_bias: bool = True) -> tuple[Tensor, Tensor]:
    """(W, b) = argmin sum of |W x + b - y|^2 + lambda |W - prior|^2, in float64; without a bias, b is 0.

    Args:
        prior: (g, o, k); None: 0.
        damping: lambda, as a share of the mean of the Gram matrix's diagonal; more where that is singular all the same.

    Raises:
        ValueError: the moments are not finite.

    >>> moments = Moments.none(1, 1, 1)
    >>> moments.add(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[3.0]], [[7.0]]]))
    >>> [round(value.item(), 6) for value in solve(moments, torch.zeros(1, 1, 1), 0.0)]
    [2.0, 1.0]
    """
    if not moments.is_finite:
        raise ValueError("the moments are not finite: what the layer reads or should give is not")
    xx, yx = moments.xx, moments.yx
    if not has_bias:
        xx = xx + moments.n * moments.mean_x[:, :, None] * moments.mean_x[:, None]
        yx = yx + moments.n * moments.mean_y[:, :, None] * moments.mean_x[:, None]
    if prior is None:
        weight = _solved(xx, yx, damping)
    else:
        prior = _double(prior, xx.device)
        weight = prior + _solved(xx, yx - prior @ xx, damping)
    bias = moments.mean_y - (weight @ moments.mean_x[:, :, None])[:, :, 0]
    return weight, bias if has_bias else torch.zeros_like(bias)


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """right (gram + lambda)^-1 of each group; 0 where the group's columns are."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1)
    size = torch.where(mean > 0, mean, 1.0)[:, None, None]
    gram, right = gram / size, right / size
    while True:
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return torch.cholesky_solve(right.mT, factor).mT
        damping = max(1e-10, 10 * damping)


def error(moments: Moments, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean square of W x + b - y over the rows, (g, o)."""
    weight, bias = (_double(value, moments.xx.device) for value in (weight, bias))
    spread = ((weight @ moments.xx - 2 * moments.yx) * weight).sum(2) + moments.yy
    shift = (weight @ moments.mean_x[:, :, None])[:, :, 0] + bias - moments.mean_y
    return spread.clamp(min=0) / max(1, moments.n) + shift**2


LACKS_NOTHING = "its output is the dense layer's"


def noise(dtype: torch.dtype) -> float:
    """The relative mean square error that sums have in this type: a smaller one is none."""
    return (4 * torch.finfo(dtype).eps) ** 2


# ---- layers as matrices


def why_no_matrix(module: nn.Module) -> str | None:
    """Why a layer cannot be seen as one matrix a group, or None."""
    if not isinstance(module, nn.Linear | _CONV) and not is_conv1d(module):
        return f"it is a {type(module).__name__}"
    if not isinstance(module._parameters.get("weight"), Tensor):
        return "its weight is computed from other tensors"
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a transposed convolution: a plain one of the spread input, with its kernel turned round."""
    return isinstance(module, _CONV) and bool(module.transposed)


def rows_dim(module: nn.Module) -> int:
    """The dimension of a layer's weight that its outputs lie along; its inputs lie along the other of 0 and 1."""
    return 1 if is_conv1d(module) or is_transposed(module) else 0


def kept_rows(module: Any, cuts: Mapping[int, Tensor], sizes: Mapping[int, int]) -> Tensor | None:
    """Of a dense layer's output channels, those that a cut plan keeps; None: all.

    Args:
        cuts, sizes: dimension of the weight -> positions that stay, and its dense length.

    >>> up = nn.ConvTranspose1d(2, 6, 1, groups=2)
    >>> kept_rows(up, {1: torch.tensor([0, 2])}, {1: 3}).tolist()
    [0, 2, 3, 5]
    """
    kept = cuts.get(rows_dim(module))
    if kept is None or not is_transposed(module):
        return kept
    size = sizes[1]
    return (torch.arange(module.groups, device=kept.device)[:, None] * size + kept).flatten()


def as_matrix(module: Any, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as (g, o, k)."""
    if is_conv1d(module):
        return tensor.T[None]
    groups = getattr(module, "groups", 1)
    if is_transposed(module):
        parts = tensor.reshape(groups, len(tensor) // groups, *tensor.shape[1:])
        grouped = parts.transpose(1, 2)  # (g, o, in / g, *kernel)
        return grouped.flip([*range(3, grouped.dim())]).flatten(2)
    return tensor.reshape(groups, len(tensor) // groups, -1)


def as_weight(module: Any, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`.

    >>> up = nn.ConvTranspose2d(4, 6, (3, 2), groups=2)
    >>> torch.equal(as_weight(up, as_matrix(up, up.weight)), up.weight)
    True
    """
    if is_conv1d(module):
        return matrix[0].T
    if is_transposed(module):
        grouped = matrix.reshape(*matrix.shape[:2], -1, *module.weight.shape[2:])
        return grouped.flip([*range(3, grouped.dim())]).transpose(1, 2).flatten(0, 1)
    return matrix.reshape(module.weight.shape)


def matrix_of(module: Any) -> Tensor:
    """The weight as (g, o, k)."""
    return as_matrix(module, module.weight.detach())


@torch.no_grad()
def write_matrix(module: Any, matrix: Tensor) -> None:
    """The inverse of `matrix_of`, in place."""
    module.weight.copy_(as_weight(module, matrix))  # to its device


def read_rows(module: Any, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the layer multiplies, (m, g, k), at the chosen positions (of the flattened ones of its output), or at all.

    >>> read_rows(nn.Conv1d(1, 1, 2, padding=1), torch.tensor([[[1.0, 2.0]]])).tolist()
    [[[0.0, 1.0]], [[1.0, 2.0]], [[2.0, 0.0]]]
    """
    if not isinstance(module, _CONV):
        flat = x.reshape(-1, x.shape[-1])
        return (flat if chosen is None else flat[chosen])[:, None]
    patches = _patches(module, x)  # (n, *positions, c, *kernel)
    dims = len(module.kernel_size)
    if chosen is not None:
        patches = patches[torch.unravel_index(chosen, patches.shape[: dims + 1])]
    return patches.reshape(-1, module.groups, patches.shape[-dims - 1 :].numel() // module.groups)


def given_rows(module: Any, y: Tensor, chosen: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """A dense layer's output at the same positions, (m, g, o), of the output channels that are kept."""
    flat = y.movedim(-len(module.kernel_size) - 1, -1) if isinstance(module, _CONV) else y
    flat = flat.reshape(-1, flat.shape[-1])
    flat = flat if chosen is None else flat[chosen]
    flat = flat if kept is None else flat[:, kept.to(flat.device)]
    groups = getattr(module, "groups", 1)
    return flat.reshape(len(flat), groups, flat.shape[1] // groups)  # of no rows, too: an expert may get no token


def positions(module: Any, y: Tensor) -> int:
    """How many rows an output has."""
    channels = y.shape[-len(module.kernel_size) - 1] if isinstance(module, _CONV) else y.shape[-1]
    return y.numel() // channels if channels else 0


def _patches(module: Any, x: Tensor) -> Tensor:
    """A view of the padded input: of each output position the entries that it is computed from."""
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    kernel, dilation = module.kernel_size, module.dilation
    if is_transposed(module):
        x, stride = _spread(module, x), (1,) * dims
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, stride = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), module.stride
    sides = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dims)]
    steps = x.stride()
    return x.as_strided(
        (len(x), *sides, x.shape[1], *kernel),
        (
            steps[0],
            *(steps[2 + i] * stride[i] for i in range(dims)),
            steps[1],
            *(steps[2 + i] * dilation[i] for i in range(dims)),
        ),
        x.storage_offset(),
    )


def _spread(module: Any, x: Tensor) -> Tensor:
    """What a transposed convolution is a plain one of: the input with stride - 1 zeros between its entries, padded."""
    dims = len(module.kernel_size)
    wide = x.new_zeros(*x.shape[:2], *((x.shape[2 + i] - 1) * module.stride[i] + 1 for i in range(dims)))
    places: Any = (..., *(slice(None, None, step) for step in module.stride))
    wide[places] = x
    room = [module.dilation[i] * (module.kernel_size[i] - 1) - module.padding[i] for i in range(dims)]
    pads = [pad for i in reversed(range(dims)) for pad in (room[i], room[i] + module.output_padding[i])]
    return F.pad(wide, pads)


def multiplies(module: Any, x: Tensor, y: Tensor) -> bool:
    """Whether what a layer gave is its weight times what it read, and its bias: looked at in a few rows.

    It is not where a forward pass of its own pads the input or computes another weight.

    >>> layer, x = nn.Linear(2, 2), torch.ones(3, 2)
    >>> multiplies(layer, x, layer(x)), multiplies(layer, x, 2 * layer(x))
    (True, False)
    """
    count = positions(module, y)
    if isinstance(module, _CONV):
        wanted = _sides(module, x)
        if wanted != [*y.shape[-len(wanted) :]]:
            return False
    elif x.shape[:-1] != y.shape[:-1]:
        return False
    if not count:
        return True  # nothing says that it is not
    rows = torch.arange(0, count, max(1, count // 64), device=x.device)
    read, given = read_rows(module, x, rows), given_rows(module, y, rows)
    found = (read.transpose(0, 1).double() @ matrix_of(module).double().mT).transpose(0, 1)
    if module.bias is not None:
        found = found + module.bias.detach().double().view(found.shape[1:])
    if not (given.isfinite().all() and found.isfinite().all()):
        return True
    tolerance = min(0.05, 50 * torch.finfo(y.dtype).eps ** 0.75)
    return torch.allclose(found, given.double(), rtol=0, atol=tolerance * max(1e-30, float(found.abs().max())))


def _sides(module: Any, x: Tensor) -> list[int]:
    """How long the output of a convolution is along each dimension."""
    kernel = module.kernel_size
    given = zip(x.shape[-len(kernel) :], _paddings(module), module.stride, module.dilation, kernel, strict=True)
    if is_transposed(module):
        return [
            (side - 1) * stride - 2 * int(pad or 0) + step * (size - 1) + more + 1
            for (side, pad, stride, step, size), more in zip(given, module.output_padding, strict=True)
        ]
    return [
        (side + 2 * pad - step * (size - 1) - 1) // stride + 1 if isinstance(pad, int) else side
        for side, pad, stride, step, size in given
    ]


def _paddings(module: Any) -> list[int | None]:
    """On either side of each dimension; None where that keeps the size ("same")."""
    if module.padding == "same":
        return [None] * len(module.kernel_size)
    return [0] * len(module.kernel_size) if module.padding == "valid" else [*module.padding]


# ---- the moments of a visited layer


def choose_rows(counts: Sequence[int], most: int = POSITIONS) -> list[Tensor | None]:
    """Of batches with so many rows, which are read: all (None), or an equal share of each, at random.

    >>> choose_rows([3, 4]), [len(chosen) for chosen in choose_rows([300, 100], most=40)]
    ([None, None], [30, 10])
    """
    total = sum(counts)
    if total <= most:
        return [None] * len(counts)
    ends = [most * sum(counts[:i]) // total for i in range(len(counts) + 1)]
    generator = torch.Generator().manual_seed(total)
    return [
        torch.randperm(count, generator=generator, device="cpu")[: end - start].sort().values
        for count, (start, end) in zip(counts, pairwise(ends), strict=True)
    ]


def rows_of(visit: Visit, counts: Sequence[int], most: int = POSITIONS) -> list[Tensor | None]:
    """Which of the rows of each batch are read, on the device of what the layer reads; None: all. Padding is not."""
    real: list[Tensor | None] = [None] * len(counts)
    for i, (x, mask) in enumerate(zip(visit.inputs, visit.tokens, strict=False)):
        if mask is not None and x.shape[:2] == mask.shape and counts[i] == mask.numel():
            real[i] = mask.flatten().nonzero().flatten().to(x.device)
    left = [count if rows is None else len(rows) for count, rows in zip(counts, real, strict=True)]
    chosen = [c if c is None else c.to(x.device) for c, x in zip(choose_rows(left, most), visit.inputs, strict=True)]
    return [c if rows is None else rows if c is None else rows[c] for c, rows in zip(chosen, real, strict=True)]


class Seen(NamedTuple):
    """The moments of a visited layer on the two parts, and the variance of the dense output, its channels added up."""

    fit: Moments
    judge: Moments
    variance: float


def moments_of(
    visit: Visit,
    *,
    kept: Tensor | None = None,
    residual: bool = False,
    slope: Tensor | None = None,
    most: int = POSITIONS,
    columns: Tensor | None = None,
) -> Seen:
    """Of a visited layer, x what the small one reads and y what the dense one gave.

    Where the visit has a residual stream, y is the dense sum less the small network's stream: what was lost before is
    made up for.

    Args:
        kept: of the dense layer's output channels, those that the small layer has.
        residual: y is the dense output less what the small layer gives now, so that small errors stay exact.
        slope: of each output channel, what a norm between the layer and the sum multiplies it by.
        most: rows that are read, over all batches.
        columns: of the small layer's, those that x is of; None: all. y is what all of them lack.
    """
    fit, judge, whole = summed(visit, kept=kept, residual=residual, slope=slope, most=most, columns=columns)
    return Seen(fit, judge, float(whole.yy.sum()) / max(1, whole.n))


def summed(
    visit: Visit,
    *,
    kept: Tensor | None,
    residual: bool,
    slope: Tensor | None,
    most: int,
    columns: Tensor | None,
) -> tuple[Moments, Moments, Moments]:
    """The moments of the two parts, and of the dense output on both; nothing here waits for the device."""
    small: Any = visit.small
    weight = matrix_of(small)
    groups, outputs, width = weight.shape
    device = weight.device if weight.device.type != "mps" else torch.device("cpu")
    fit, judge = (Moments.none(groups, width if columns is None else len(columns), outputs, device) for _ in range(2))
    whole = Moments.none(groups, 0, outputs, device)
    counts = [positions(small, y) for y in visit.outputs]
    parts = _in_parts(rows_of(visit, counts, most), visit, None if columns is None else max(1, ENTRIES // width))
    for i, rows in parts:
        x, y = visit.inputs[i], visit.outputs[i]
        read, given = read_rows(small, x, rows), given_rows(small, y, rows, kept)
        whole.add(read[:, :, :0], given)
        if visit.streams and visit.streams[i][0].shape == y.shape:
            given = given + _lost(small, visit.streams[i], rows, kept, slope)
        y = _residual(small, weight, read, given, device) if residual else given
        (judge if visit.held_back[i] else fit).add(read if columns is None else read[..., columns.to(read.device)], y)
    return fit, judge, whole


def _in_parts(chosen: Sequence[Tensor | None], visit: Visit, most: int | None) -> Iterator[tuple[int, Tensor | None]]:
    """(batch, rows of it that are read at once): at most so many; None: all of the batch."""
    for i, rows in enumerate(chosen):
        if most is None:
            yield i, rows
            continue
        every = torch.arange(positions(visit.small, visit.outputs[i]), device=visit.inputs[i].device)
        for part in torch.split(every if rows is None else rows, most):
            yield i, part


def _lost(
    small: Any, streams: tuple[Tensor, Tensor], rows: Tensor | None, kept: Tensor | None, slope: Tensor | None
) -> Tensor:
    """What the dense stream holds more than the small one, as the layer would have to give it."""
    dense, now = (given_rows(small, streams[0], rows, kept), given_rows(small, streams[1], rows))
    lost = dense - now
    if slope is None:
        return lost
    slope = slope.view(lost.shape[1:])
    return torch.where(slope.abs() > FLAT, lost / slope, 0.0)


def _residual(small: Any, weight: Tensor, read: Tensor, given: Tensor, device: torch.device) -> Tensor:
    work = _work(given.dtype, device)
    weight, read, given = (value.to(device).to(work) for value in (weight, read, given))
    lacking = given - (read.transpose(0, 1) @ weight.mT).transpose(0, 1)
    return lacking if small.bias is None else lacking - small.bias.detach().to(device).to(work).view(given.shape[1:])
