"""Multi-scale quantiser in numpy: feature map ↔ token pyramid, for encoding, decoding and reconstruction.

The same arithmetic as in the scale graphs (paper section 3.2, algorithms 1 and 2), for callers that have all tokens or
want them. Axes: B images, C code width, h side of the feature map, n tokens of a scale, V codebook entries.
"""

from __future__ import annotations

import numpy as np

from .bundle import Bundle
from .config import VQVAEConfig
from .errors import BundleError
from .interpolation import area_matrix, bicubic_matrix
from .products import single_threaded


class Quantizer:
    """Codebook and φ convolutions of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.config: VQVAEConfig = bundle.manifest.vqvae
        C, P = self.config.z_channels, self.config.num_phi
        self.codebook_VC = _weight(bundle, "quantize.embedding.weight", self.config.vocab_size, C)
        self._phi_weight_PCC33 = _weight(bundle, "quantize.phi.weight", P * C, C, 3, 3).reshape(P, C, C, 3, 3)
        self._phi_bias_PC = _weight(bundle, "quantize.phi.bias", P * C).reshape(P, C)

    def difference(self, other: Quantizer) -> str | None:
        """What makes the same tokens mean something else there; None: nothing does."""
        for what, ours, theirs in (
            ("codebooks", self.codebook_VC, other.codebook_VC),
            ("φ convolutions", self._phi_weight_PCC33, other._phi_weight_PCC33),
            ("φ biases", self._phi_bias_PC, other._phi_bias_PC),
        ):
            if not np.array_equal(ours, theirs):
                return what
        return None

    def features_from_tokens(self, tokens: list[np.ndarray]) -> np.ndarray:
        """f_hat [B, C, h, h] of the given scales (all, or the first few), each int64 [B, n_k]."""
        with single_threaded():
            return np.sum([self._contribution(k, self.codebook_VC[t_Bn]) for k, t_Bn in enumerate(tokens)], axis=0)

    def tokens_from_features(self, f_BChh: np.ndarray) -> list[np.ndarray]:
        """Token pyramid of a feature map: K arrays int64 [B, n_k]."""
        config = self.config
        rest_BChh, tokens = f_BChh, []
        for k, pn in enumerate(config.patch_nums):
            shrink = area_matrix(config.latent_size, pn)
            with single_threaded():
                tokens_Bn = self._nearest(shrink @ rest_BChh @ shrink.T)
                rest_BChh = rest_BChh - self._contribution(k, self.codebook_VC[tokens_Bn])
            tokens.append(tokens_Bn)
        return tokens

    def _contribution(self, k: int, codes_BnC: np.ndarray) -> np.ndarray:
        """What scale k's codes add to f_hat: enlarged, then φ. Shape [B, C, h, h]."""
        config, pn = self.config, self.config.patch_nums[k]
        enlarge = bicubic_matrix(pn, config.latent_size)
        map_BChh = enlarge @ codes_BnC.transpose(0, 2, 1).reshape(len(codes_BnC), -1, pn, pn) @ enlarge.T
        p, h = config.phi_index(k), config.latent_size
        padded = np.pad(map_BChh, ((0, 0), (0, 0), (1, 1), (1, 1)))
        result = np.broadcast_to(self._phi_bias_PC[p][:, None, None], map_BChh.shape).copy()
        for dy in range(3):
            for dx in range(3):
                window_BCl = padded[:, :, dy : dy + h, dx : dx + h].reshape(len(result), -1, h * h)
                result += (self._phi_weight_PCC33[p, :, :, dy, dx] @ window_BCl).reshape(result.shape)
        return result

    def _nearest(self, z_BChw: np.ndarray) -> np.ndarray:
        """Index of the nearest codebook entry for every cell, row-major: int64 [B, h·w]."""
        e_VC = self.codebook_VC
        z_NC = z_BChw.transpose(0, 2, 3, 1).reshape(-1, e_VC.shape[1])
        if self.config.using_znorm:
            index_N = (_unit(z_NC) @ _unit(e_VC).T).argmax(axis=1)
        else:
            squares_NV = np.square(z_NC).sum(axis=1, keepdims=True) + np.square(e_VC).sum(axis=1)
            index_N = (squares_NV - 2.0 * (z_NC @ e_VC.T)).argmin(axis=1)
        return index_N.reshape(len(z_BChw), -1)


def _weight(bundle: Bundle, name: str, *shape: int) -> np.ndarray:
    value = bundle.weight(name)
    if value.shape != shape:
        raise BundleError(f"{bundle.path}: {name} has shape {value.shape}, expected {shape}; export the bundle again")
    return value


def _unit(x_NC: np.ndarray) -> np.ndarray:
    return x_NC / np.maximum(np.linalg.norm(x_NC, axis=1, keepdims=True), 1e-12)
