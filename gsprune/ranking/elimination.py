"""Backward elimination of units whose readers are refitted each time: what the removal of each costs.

Legend: u = units, w = positions of a unit, k = columns of a reader, o = its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARE = 1 / 32  # of the units that are left, removed between two updates of the whole inverse
SPARE = 4  # candidates looked at for each unit that is removed


@dataclass(frozen=True, eq=False)
class Reader:
    """A matrix that reads the units: y = W x.

    weight    (o, k)
    gram      (k, k): the second moment of x, E[x x^T]
    columns   (u, w) int64: which columns read each unit
    inverses  damping -> inverse of the damped gram: one for all structures that a matrix reads
    """

    weight: Tensor
    gram: Tensor
    columns: Tensor
    inverses: dict[float, Tensor] = field(default_factory=dict, repr=False)


def eliminate(readers: Sequence[Reader], *, damping: float = 1e-2) -> Tensor:
    """The price of each unit in error: how much E|y - y'|^2 grows when it goes and the readers are refitted.

    Units go one after the other, the cheapest first. With H = E[x x^T] over what is left and S the columns of a unit,
    the least-squares refit of what remains makes the error grow by

        d = trace(W[:, S] ([H^-1][S, S])^-1 W[:, S]^T)

    summed over the readers; then W <- W - W[:, S] ([H^-1][S, S])^-1 [H^-1][S, :], and H^-1 loses S. Many units go
    between two updates of the whole inverse; among the candidates for it every removal is accounted for.

    Args:
        damping: added to the diagonal of H, as a share of its mean.

    Returns:
        float64 (u,): the price of each unit when it went, or that of the dearest before it. The lowest go first, so a
        cut at any count is the cut that the elimination would make.

    Raises:
        ValueError: a Gram matrix is not finite.

    Source: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1993; Kurtic et
    al., "ZipLM: inference-aware structured pruning of language models", 2023, for whole units.

    >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two columns are alike
    >>> price = eliminate([Reader(torch.ones(1, 3), gram, torch.arange(3).reshape(3, 1))], damping=1e-6)
    >>> [round(value, 2) for value in price.tolist()]
    [0.0, 4.0, 1.0]
    """
    states = [_State(reader, damping) for reader in readers]
    units = len(readers[0].columns)
    price = torch.zeros(units, dtype=torch.float64)
    alive = torch.arange(units, device=readers[0].columns.device)
    dearest = 0.0
    while len(alive):
        costs = _costs(states, alive)
        count = max(1, int(len(alive) * SHARE))
        candidates = alive[costs.argsort()[: SPARE * count]] if len(alive) > 1 else alive
        gone = []
        for unit, cost in _in_turn([state.only(candidates) for state in states], candidates, count):
            dearest = max(dearest, cost)
            price[unit] = dearest
            gone.append(unit)
        removed = torch.tensor(gone, device=alive.device)
        for state in states:
            state.remove(removed)
        alive = alive[~torch.isin(alive, removed)]
    return price


class _State:
    """A reader with the columns of units that are left: their part of the inverse Gram matrix, the refitted weight."""

    def __init__(self, reader: Reader, damping: float) -> None:
        flat = reader.columns.flatten()  # the others stay: what happens to them changes no price
        if damping not in reader.inverses:
            reader.inverses[damping] = _inverse(reader.gram.double(), damping)
        weight = reader.weight[:, flat].double()
        is_tall = weight.shape[0] > weight.shape[1]  # W and R of W = Q R cost the same, and R is smaller
        self.weight: Tensor = torch.linalg.qr(weight, mode="r").R if is_tall else weight
        self.inverse = reader.inverses[damping][flat][:, flat]
        self.columns = torch.arange(len(flat), device=flat.device).reshape(reader.columns.shape)

    def only(self, units: Tensor) -> _Few:
        """What is needed to remove some of these units one after the other."""
        flat = self.columns[units].flatten()
        weight = self.weight[:, flat]
        columns = torch.arange(len(flat), device=flat.device).reshape(len(units), -1)
        return _Few(self.inverse[flat][:, flat], weight.T @ weight, columns)

    def costs(self, units: Tensor) -> Tensor:
        """(u,): what each would cost now."""
        columns = self.columns[units]
        if columns.shape[1] == 1:
            flat = columns[:, 0]
            pivots: Tensor = self.inverse.diagonal()[flat]
            return self.weight[:, flat].square().sum(0) / pivots
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weight[:, columns].permute(1, 2, 0)  # (u, w, o)
        solved: Tensor = torch.linalg.solve(blocks, weights)
        return (solved * weights).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Refit what is left, and forget the columns of these units."""
        flat = self.columns[units].flatten()
        left = torch.ones(len(self.inverse), dtype=torch.bool, device=flat.device)
        left[flat] = False
        gone = self.inverse[flat]
        rows = torch.linalg.solve(gone[:, flat], gone[:, left])  # (s, k - s)
        self.weight = self.weight[:, left].sub_(self.weight[:, flat] @ rows)
        self.inverse = self.inverse[left][:, left].sub_(gone[:, left].T @ rows)
        self.columns = (left.cumsum(0) - 1)[self.columns]  # of units that are gone: never read again


class _Few:
    """Candidates of a reader, for which the products W^T W of their columns do: removals are updates in place."""

    def __init__(self, inverse: Tensor, squares: Tensor, columns: Tensor) -> None:
        self.inverse, self.squares, self.columns = inverse, squares, columns

    def costs(self, units: Tensor) -> Tensor:
        """(u,): what each would cost now."""
        columns = self.columns[units]
        if columns.shape[1] == 1:
            flat = columns[:, 0]
            costs: Tensor = self.squares.diagonal()[flat] / self.inverse.diagonal()[flat]
            return costs
        rows, cols = columns[:, :, None], columns[:, None, :]
        solved = torch.linalg.solve(self.inverse[rows, cols], self.squares[rows, cols])
        traces: Tensor = solved.diagonal(dim1=1, dim2=2).sum(1)
        return traces

    def remove(self, units: Tensor) -> None:
        """Refit what is left; the columns of these units are not read again."""
        flat = self.columns[units].flatten()
        gone, squares = self.inverse[flat], self.squares[flat]
        rows = torch.linalg.solve(gone[:, flat], gone) if len(flat) > 1 else gone / gone[:, flat]  # (s, k)
        self.inverse.addmm_(gone.T, rows, alpha=-1)
        half = squares.T - rows.T @ (squares[:, flat] / 2)
        both = half @ rows
        self.squares.sub_(both).sub_(both.T)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    if not gram.isfinite().all():
        raise ValueError("the second moments of a layer's inputs are not finite")
    ridge = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * gram.diagonal().mean() + 1e-30)
    inverse: Tensor = torch.linalg.inv(gram + ridge)
    return inverse


def _costs(states: Sequence[_State] | Sequence[_Few], units: Tensor) -> Tensor:
    total = states[0].costs(units)
    for state in states[1:]:
        total = total + state.costs(units)
    return total.clamp_(min=0.0)


def _in_turn(states: Sequence[_Few], units: Tensor, count: int) -> list[tuple[int, float]]:
    """Of the units the cheapest, its price, and the same of what is left, `count` times."""
    found: list[tuple[int, float]] = []
    left = torch.arange(len(units), device=units.device)
    for _ in range(count):
        costs = _costs(states, left)
        best = int(costs.argmin())
        found.append((int(units[left[best]]), float(costs[best])))
        for state in states:
            state.remove(left[best : best + 1])
        left = torch.cat([left[:best], left[best + 1 :]])
    return found
