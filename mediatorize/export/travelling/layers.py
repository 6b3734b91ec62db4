"""timm's three layers as DiT and SiT use them: the same parameters and the same operations, in eval mode bit for bit.

Softmax attention runs by the backend that diffusers' `set_attention_backend` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn


class AttentionBackend:
    """Where diffusers puts the backend that was chosen for one attention layer; None is its default."""

    _attention_backend: Any = None


class Attention(nn.Module, AttentionModuleMixin):  # type: ignore[misc, unused-ignore]
    """Multi-head self-attention of a joint projection: `qkv`, then `proj`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.processor: Any = AttentionBackend()

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (b, n, h, d)
        q, k = self.q_norm(q.transpose(1, 2)).transpose(1, 2), self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        return self.proj(dispatch_attention_fn(q, k, v, backend=self.processor._attention_backend).flatten(2))


class Mlp(nn.Module):
    """`fc1`, activation, `fc2`."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """(b, channels, height, width) -> (b, n, c): a linear projection of every patch."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(f"Input of {list(x.shape[2:])} where the model takes {list(self.img_size)}.")
        return self.proj(x).flatten(2).mT
