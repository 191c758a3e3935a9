"""nn.MultiheadAttention with an inner width of its own, so that heads can be removed from it.

PyTorch's class insists that heads times head width is the width of the tokens. `narrow` turns an instance into a
`NarrowAttention`, in place: same object, same parameter names, another forward pass. Shrinking does that to an
attention it cuts; until then the model runs PyTorch's own.

Shapes: n = batch, t = query tokens, s = key tokens, h = heads, d = width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsprune.surgery.no_branch import NoBranch


class NarrowAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads need not add up to the width of its tokens.

    Same arguments, same masks (True = not looked at) and same state as `nn.MultiheadAttention`; `num_heads` and
    `head_dim` say how its projections are cut. Without weights asked for it runs `scaled_dot_product_attention`.
    Made by `narrow` only.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: nested tensors; an `attn_mask` for another number of heads; `is_causal` without `attn_mask`.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("an attention with removed heads takes no nested tensors: pass a key_padding_mask")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which was not given")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q_nhtd, k_nhsd, v_nhsd = (
            x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in self._project(query, key, value)
        )
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q_nhtd)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q_nhtd @ k_nhsd.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed_nhtd = weights @ v_nhsd
        else:
            mixed_nhtd = F.scaled_dot_product_attention(
                q_nhtd, k_nhsd, v_nhsd, attn_mask=mask, dropout_p=dropout, is_causal=hinted
            )
        out = self.out_proj(mixed_nhtd.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            rows: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            rows = self.in_proj_weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), rows, biases, strict=True))

    def _mask(self, attn_mask: Tensor | None, padding_ns: Tensor | None, q_nhtd: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores, (n or 1, h or 1, t or 1, s)."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                n, heads = q_nhtd.shape[:2]
                if len(attn_mask) != n * heads:
                    given = f"{len(attn_mask)} for a batch of {n}"
                    raise ValueError(
                        f"attn_mask must hold {heads} masks a sample, one for each head that is left, not {given}"
                    )
                attn_mask = attn_mask.reshape(n, heads, *attn_mask.shape[1:])
            masks.append(_additive(attn_mask, q_nhtd.dtype))
        if padding_ns is not None:
            masks.append(_additive(padding_ns, q_nhtd.dtype)[:, None, None])
        return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def why_not_narrow(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot lose heads, or None."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it is an nn.MultiheadAttention with add_bias_kv or add_zero_attn, which is not supported"
    if type(attention).forward not in (nn.MultiheadAttention.forward, NarrowAttention.forward):
        return f"it is a {type(attention).__name__}, an nn.MultiheadAttention with a forward pass of its own"
    return None


def narrow(attention: nn.MultiheadAttention) -> None:
    """Make `attention` a `NarrowAttention` in place; what it computes stays the same.

    The fast path of `nn.TransformerEncoderLayer`, which reads the projections past the forward pass and assumes their
    width, is closed by the flag it asks first.

    >>> attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.ones(1, 3, 8)
    >>> before = attention(x, x, x)[0]
    >>> narrow(attention)
    >>> type(attention).__name__, torch.allclose(attention(x, x, x)[0], before, atol=1e-6)
    ('NarrowAttention', True)
    """
    reason = why_not_narrow(attention)
    if reason is not None:
        raise ValueError(f"heads cannot be removed: {reason}")
    attention.__class__ = NarrowAttention
    attention._qkv_same_embed_dim = False


def close_nested_path(model: nn.Module) -> None:
    """Keep encoders with a `NarrowAttention` from packing padded batches into nested tensors, which it cannot take.

    Those that lost a branch also run without PyTorch's fused path, which reads the weights of all of them.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, NarrowAttention | NoBranch) for m in module.modules()
        ):
            module.use_nested_tensor = module.enable_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, NoBranch) for m in module.children()):
            module.activation_relu_or_gelu = 0
            if isinstance(module.self_attn, NoBranch):
                module.self_attn.in_proj_bias = None  # type: ignore[assignment]
