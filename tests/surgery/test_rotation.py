"""Rotated streams: the network computes the same, its axes are those of the data, and what cannot turn is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune import cut, load_pruned
from gsprune.criteria import OBS, SparseGPT
from gsprune.cutting.family import cut_family
from gsprune.discovery.find import find_structures
from gsprune.structures.running import outputs
from gsprune.structures.structure import Structure
from gsprune.surgery.rotation import norms_of, principal_axes, rotated
from gsprune.surgery.shrink import mask_units

WIDTH = 8


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 * self.norm(x)  # a multiple of the norm is read, too
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tokens(nn.Module):
    """A decoder without attention: embedding, two blocks, a norm and a head."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.Sequential(Block(norm(WIDTH)), Block(norm(WIDTH)))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 20, bias=False)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                    module.weight.uniform_(0.3, 1.7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def tokens(norm: type[nn.Module] = nn.RMSNorm) -> tuple[Tokens, Tensor]:
    torch.manual_seed(3)
    return Tokens(norm), torch.randint(20, (6, 9))


def streams(model: nn.Module, x: Tensor) -> list[Structure]:
    return [s for s in find_structures(model, x).structures if s.kind == "residual"]


def test_the_network_computes_the_same_in_float64() -> None:
    model, ids = tokens()
    model = model.double()
    before = copy.deepcopy(model.state_dict())
    other = rotated(model, streams(model, ids), ids, [ids])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for x in (ids, torch.randint(20, (2, 3)), torch.arange(20)[None]):
        torch.testing.assert_close(other(x), model(x), rtol=1e-11, atol=1e-12)
    assert all((m.weight == 1).all() for m in other.modules() if isinstance(m, nn.RMSNorm))
    torch.testing.assert_close(other.embed.weight @ other.embed.weight.T, model.embed.weight @ model.embed.weight.T)
    assert float((other.embed.weight - model.embed.weight).detach().abs().max()) > 0.1


def test_the_axes_are_the_eigenvectors_of_what_the_norms_read() -> None:
    """Rows (1, 1) and (3, 3) lie on one axis: their moment is ((1, 1), (1, 1)) each, (-1, 1) has a fourth of it."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2), nn.Linear(2, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0], [-2.0, -2.0], [0.5, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    stream = streams(net, x)[0]
    axes = principal_axes(net, stream, norms_of(net, stream), [x[:2], x[2:]])
    expected = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close((axes.T @ expected.T).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close((rotated(net, [stream], x, [x])[0].weight @ expected.T).abs(), torch.eye(2).double())


def test_the_first_positions_carry_most() -> None:
    model, ids = tokens()
    other = rotated(model, streams(model, ids), ids, [ids])
    read: list[Tensor] = []
    for norm in (other.blocks[0].norm, other.blocks[1].norm, other.norm):
        norm.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().flatten(0, 1)))
    other(ids)
    rows = torch.cat([x / x.square().mean(1, keepdim=True).sqrt() for x in read])
    moment = rows.T @ rows / len(rows)
    power = moment.diagonal()
    assert torch.equal(power.argsort(descending=True), torch.arange(WIDTH))
    assert float(power.sum()) == pytest.approx(WIDTH, rel=1e-5)
    assert float((moment - power.diag()).abs().max()) < 1e-5


def test_masked_equals_cut_and_the_file_holds_it(tmp_path) -> None:
    model, ids = tokens()
    model = model.double()
    found = cut(model, [ids], kinds=["residual"], sparsity=0.5, repair=None, rotate=True, progress=False)
    assert found.rotated == ("embed",)
    assert dict(found.rows())["rotated"] == "embed"
    assert [int(keep.sum()) for keep in found.keeps.values()] == [4]
    masked = rotated(model, found.structures, ids[:2], [ids])
    mask_units(masked, found.structures, [*found.keeps.values()])
    for x in (ids, torch.randint(20, (1, 30))):
        torch.testing.assert_close(found.model(x), masked(x), rtol=1e-9, atol=1e-9)
    found.save(tmp_path)
    assert torch.equal(load_pruned(tmp_path, Tokens().double())(ids), found.model(ids))


def test_a_stream_of_low_rank_loses_nothing() -> None:
    """What it holds has four dimensions of eight, in no basis that a cut without rotation could see."""
    model, ids = tokens()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:4]
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight @ turn.T @ turn)
        for block in model.blocks:
            block.down.weight.copy_(turn.T @ turn @ block.down.weight)
            block.down.bias.copy_(turn.T @ turn @ block.down.bias)
    settings = {"kinds": ["residual"], "repair": None, "criterion": OBS(), "progress": False}
    plain, turned = (cut(model, [ids], sparsity=0.5, rotate=rotate, **settings) for rotate in (False, True))
    torch.testing.assert_close(turned.model(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert float((plain.model(ids) - model(ids)).detach().abs().max()) > 0.1
    family = cut_family(model, [ids], sparsity=[0.25, 0.5], rotate=True, **settings)
    torch.testing.assert_close(family[1].model(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_a_llama_with_grouped_queries() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.3, 1.7) if "norm" in name else parameter.mul_(5)
    ids = torch.randint(40, (3, 7))
    other = rotated(model, streams(model, ids), ids, [ids])
    for x in (ids, ids[:1, :4]):  # its norms compute in float32: `outputs` has them compute in float64
        torch.testing.assert_close(outputs(other, x), outputs(model, x), rtol=1e-10, atol=1e-11)
    tied = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    with refused("model.embed_tokens.weight", "model.norm", "tie_word_embeddings=False"):
        rotated(tied, streams(tied, ids), ids, [ids])


class Scaled(nn.Module):
    """Reads the positions of its stream one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(x + torch.relu(x)))


def test_what_cannot_turn_is_refused() -> None:
    model, ids = tokens(nn.LayerNorm)
    with refused("rotate=True", "RMSNorm", "'blocks.0.norm'", "LayerNorm"):
        cut(model, [ids], kinds=["residual"], sparsity=0.5, rotate=True, progress=False)
    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(5, 4)
    with refused("'first'", "rotate=True", "one by one"):
        rotated(net, streams(net, x), x, [x])
    model, ids = tokens()
    with refused("rotate=True", "kinds=['residual']"):
        cut(model, [ids], sparsity=0.5, rotate=True, progress=False)
    with refused("pattern='2:4'", "rotate"):
        cut(model, [ids], pattern="2:4", criterion=SparseGPT(), rotate=True, progress=False)  # type: ignore[call-overload]
