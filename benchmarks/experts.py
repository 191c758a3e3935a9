"""Which experts of a mixture go: `gsprune.cut_experts` against how much the router gives them, and against chance.

    python benchmarks/experts.py [--seeds 4] [--threads 1]

scikit-learn's digits, 1,200 pictures to learn from and 597 to judge by; a network of two mixtures of eight experts, of
which each token is given to two. Accuracy in points, means over seeds and of ten draws by chance. "Gates" removes the
experts with the smallest sum of the router's weights, "outputs" those with the smallest mean of weight times the length
of the expert's output (Lasby et al., "REAP the experts", 2025). Both see the 512 pictures that the scores see.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gsprune
from gsprune.discovery.experts import find_experts, plan_experts
from gsprune.structures.twin import copy_of
from gsprune.surgery.apply import apply_cut

SHARES = (0.25, 0.5, 0.75)


class Mixture(nn.Module):
    """Eight experts, two of them a token."""

    def __init__(self, width: int = 32, experts: int = 8) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def chosen(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each expert: the tokens that it is given, the router's weights, what it answers."""
        rows = self.norm(x)
        best, numbers = self.router(rows).topk(2, dim=-1)
        weights = best.softmax(-1)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(numbers == number)
            yield token, weights[token, place], expert(rows[token])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, weight, answer in self.chosen(x):
            out = out.index_add(0, token, answer * weight[:, None])
        return x + out


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), Mixture(), Mixture(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(25):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def others(net: nn.Sequential, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """Way -> layer -> a number for each expert."""
    found: dict[str, dict[str, Tensor]] = {"gates": {}, "outputs": {}}
    for place, layer in enumerate(net):
        if isinstance(layer, Mixture):
            parts = [(weight, weight * answer.norm(dim=1)) for _, weight, answer in layer.chosen(x)]
            found["gates"][f"{place}.experts"] = torch.stack([weight.sum() for weight, _ in parts])
            means = [felt.mean() if len(felt) else felt.sum() for _, felt in parts]
            found["outputs"][f"{place}.experts"] = torch.stack(means)
        x = layer(x)
    return found


def without(net: nn.Module, x: Tensor, scores: Mapping[str, Tensor], share: float) -> nn.Module:
    """The network that keeps the experts with the largest numbers."""
    layers = find_experts(net, x)
    keeps = {name: score >= score.sort().values[round(share * len(score))] for name, score in scores.items()}
    small = copy_of(net)
    apply_cut(small, plan_experts(net, layers, keeps))
    return small.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    found: dict[tuple[str, float], list[float]] = {}

    def judge(way: str, share: float, net: nn.Module) -> None:
        right = (net(x[1200:]).argmax(1) == y[1200:]).float().mean()
        found.setdefault((way, share), []).append(100 * float(right))

    for seed in range(options.seeds):
        net = trained(x[:1200], y[:1200], seed)
        judge("dense", 0.0, net)
        seen = x[:512]
        rivals = others(net, seen)
        for share in SHARES:
            data = [(seen, y[:512])]
            judge("cut_experts", share, gsprune.cut_experts(net, data, F.cross_entropy, sparsity=share).model)
            for way, scores in rivals.items():
                judge(way, share, without(net, seen, scores, share))
            for _ in range(10):
                judge("chance", share, without(net, seen, {n: torch.rand(8) for n in rivals["gates"]}, share))
    print(f"dense {statistics.mean(found['dense', 0.0]):.1f}")
    for way in dict.fromkeys(way for way, _ in found if way != "dense"):
        shares = [f"{share:.0%} {statistics.mean(found[way, share]):.1f}" for share in SHARES]
        print(f"{way:12s} {'  '.join(shares)}")


if __name__ == "__main__":
    main()
