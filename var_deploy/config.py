"""The two model configurations: everything a VAR checkpoint pair fixes, as frozen data.

Names follow the published release (arXiv 2404.02905). B images, K scales, pn_k the side of scale k's token map,
n_k = pn_k², L = Σ n_k, V codebook entries, C code width, D transformer width, H heads. The only module of the
runtime that the trainer and the exporter share, so it imports nothing of ours but the errors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from .errors import VarDeployError

HEAD_DIM = 64  # width of one attention head in every published VAR
PLAIN_SCALE = 0.25 / HEAD_DIM**0.5  # softmax scale of attention without L2 normalisation
GROUPS = 32  # GroupNorm groups of the VQVAE


ConfigT = TypeVar("ConfigT", bound="ScalesConfig")


class ConfigError(VarDeployError):
    """A configuration value is impossible; the message names the field."""


def require(condition: bool, field: str, got: object, expected: str) -> None:
    """Raises ConfigError naming the field unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: got {got!r}, expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalesConfig:
    """The token pyramid, from coarse to fine."""

    patch_nums: tuple[int, ...]

    def __post_init__(self) -> None:
        p = self.patch_nums
        ok = isinstance(p, tuple) and len(p) >= 2 and all(_is_int(n) and n > 0 for n in p)
        require(ok, "patch_nums", p, "a tuple of at least two positive integers")
        require(all(a < b for a, b in pairwise(p)), "patch_nums", p, "strictly growing sides")

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.patch_nums)

    @property
    def tokens_per_scale(self) -> tuple[int, ...]:
        """n_k = pn_k² for every scale."""
        return tuple(pn * pn for pn in self.patch_nums)

    @property
    def num_tokens(self) -> int:
        """L = Σ n_k."""
        return sum(self.tokens_per_scale)

    @property
    def latent_size(self) -> int:
        """Side h of the feature map: that of the last scale."""
        return self.patch_nums[-1]

    def span(self, k: int) -> tuple[int, int]:
        """Half-open range of scale k's positions in the sequence of L."""
        n = self.tokens_per_scale
        return sum(n[:k]), sum(n[: k + 1])

    def ratio(self, k: int) -> float:
        """k / (K−1): how far down the pyramid scale k is."""
        return k / (self.num_scales - 1)


class PhiLayout(StrEnum):
    """Where a checkpoint stores the φ convolutions, below `quantize.quant_resi.`."""

    PARTIAL = "partial"  #: qresi_ls.{i}: a few, shared by neighbouring scales
    SINGLE = "single"  #: qresi: one for all scales
    PER_SCALE = "per_scale"  #: {i}: one for each scale


@dataclass(frozen=True, kw_only=True, slots=True)
class VQVAEConfig(ScalesConfig):
    """Multi-scale VQVAE (paper section 3.2)."""

    vocab_size: int
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    #: Number of φ convolutions.
    num_phi: int = 4
    phi_layout: PhiLayout = PhiLayout.PARTIAL
    #: Nearest code by cosine instead of squared distance. No key of a checkpoint tells; published models: False.
    using_znorm: bool = False

    def __post_init__(self) -> None:
        ScalesConfig.__post_init__(self)
        for field in ("vocab_size", "z_channels", "ch", "num_res_blocks", "num_phi"):
            value = getattr(self, field)
            require(_is_int(value) and value > 0, field, value, "a positive integer")
        require(self.ch % GROUPS == 0, "ch", self.ch, f"a multiple of {GROUPS}, the GroupNorm groups")
        ok = isinstance(self.ch_mult, tuple) and self.ch_mult and all(_is_int(m) and m > 0 for m in self.ch_mult)
        require(bool(ok), "ch_mult", self.ch_mult, "a tuple of positive integers")
        require(
            self.phi_layout in tuple(PhiLayout),
            "phi_layout",
            self.phi_layout,
            "'partial', 'single' or 'per_scale'",
        )
        object.__setattr__(self, "phi_layout", PhiLayout(self.phi_layout))  # JSON gives the plain text
        require(isinstance(self.using_znorm, bool), "using_znorm", self.using_znorm, "true or false")
        if self.phi_layout is PhiLayout.SINGLE:
            require(self.num_phi == 1, "num_phi", self.num_phi, "1 with phi_layout 'single'")

    @property
    def downsampling(self) -> int:
        """Pixels per feature-map cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        """Side of the image in pixels."""
        return self.latent_size * self.downsampling

    def phi_key(self, i: int) -> str:
        """State-dict key of φ number i, without `.weight` or `.bias`."""
        leaf = {PhiLayout.PARTIAL: f"qresi_ls.{i}", PhiLayout.SINGLE: "qresi", PhiLayout.PER_SCALE: f"{i}"}
        return f"quantize.quant_resi.{leaf[self.phi_layout]}"

    def phi_index(self, k: int) -> int:
        """Which φ scale k uses: the tick nearest to k/(K−1), the first of equally near ones.

        Ticks and distances are computed in float64 exactly as the published code does: at d16's ten scales the
        scales 2 and 7 lie half-way between two ticks, and rounding decides.
        """
        if self.num_phi == 1:
            return 0
        margin = 1 / 3 / self.num_phi if self.num_phi == 4 else 1 / 2 / self.num_phi
        ticks = np.linspace(margin, 1 - margin, self.num_phi)
        return int(np.argmin(np.abs(ticks - self.ratio(k))))


@dataclass(frozen=True, kw_only=True, slots=True)
class VARConfig(ScalesConfig):
    """VAR transformer (paper section 3.3)."""

    vocab_size: int
    z_channels: int = 32
    num_classes: int
    depth: int
    embed_dim: int
    ffn_dim: int
    #: One AdaLN projection for all blocks (d36-s) instead of one per block.
    shared_aln: bool = False
    #: Per-head L2-normalised q and k with a learned scale; False is plain attention at 0.25/√64.
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        ScalesConfig.__post_init__(self)
        for field in ("vocab_size", "z_channels", "num_classes", "depth", "embed_dim", "ffn_dim"):
            value = getattr(self, field)
            require(_is_int(value) and value > 0, field, value, "a positive integer")
        for field in ("shared_aln", "attn_l2_norm"):
            require(isinstance(getattr(self, field), bool), field, getattr(self, field), "true or false")
        require(
            self.embed_dim % HEAD_DIM == 0,
            "embed_dim",
            self.embed_dim,
            f"a multiple of the head width {HEAD_DIM}",
        )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.embed_dim // HEAD_DIM

    @property
    def null_class(self) -> int:
        """Index of the class embedding that stands for "no class" under guidance."""
        return self.num_classes


def config_to_dict(config: ScalesConfig) -> dict[str, Any]:
    """Plain JSON-ready dictionary of a configuration."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def config_from_dict(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    """Configuration from `config_to_dict`'s dictionary; unknown and missing keys are errors."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown keys {unknown}, known are {sorted(fields)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if missing:
        raise ConfigError(f"{cls.__name__}: missing keys {missing}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
