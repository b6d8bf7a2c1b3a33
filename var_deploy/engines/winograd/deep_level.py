"""The decoder's deepest level: few cells, many channels, attention. Plain NumPy on maps [C, h, w].

Its 3×3 convolutions are direct: there is little to save on so few cells, and transformed weights are four times as
many bytes as the mapped ones, which are used as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...config import GROUPS, VQVAEConfig
from .workers import Workers

NORM_EPS = 1e-6  # of every GroupNorm


class DeepLevel:
    """f_hat [C, h, h] → the map that the first doubling takes: [ch·ch_mult[−1], h, h]."""

    def __init__(self, workers: Workers, weights: Mapping[str, np.ndarray], vqvae: VQVAEConfig) -> None:
        self._workers, self._weights, self._vqvae = workers, weights, vqvae

    def __call__(self, f_hat_Chh: np.ndarray) -> np.ndarray:
        x = self._conv(self._conv(f_hat_Chh, "post_quant_conv"), "decoder.conv_in")
        x = self._residual(x, "decoder.mid.block_1")
        x = self._attention(x, "decoder.mid.attn_1")
        x = self._residual(x, "decoder.mid.block_2")
        level = f"decoder.up.{len(self._vqvae.ch_mult) - 1}"
        for j in range(self._vqvae.num_res_blocks + 1):
            x = self._residual(x, f"{level}.block.{j}")
            x = self._attention(x, f"{level}.attn.{j}")
        return x

    def _residual(self, x_Chh: np.ndarray, name: str) -> np.ndarray:
        y = self._conv(_silu(self._norm(x_Chh, f"{name}.norm1")), f"{name}.conv1")
        y = self._conv(_silu(self._norm(y, f"{name}.norm2")), f"{name}.conv2")
        y += x_Chh
        return y

    def _attention(self, x_Chh: np.ndarray, name: str) -> np.ndarray:
        C = len(x_Chh)
        qkv = self._product(f"{name}.qkv", self._norm(x_Chh, f"{name}.norm").reshape(C, -1))
        q_Cl, k_Cl, v_Cl = qkv[:C], qkv[C : 2 * C], qkv[2 * C :]
        scores_ll = (q_Cl.T * np.float32(C**-0.5)) @ k_Cl
        scores_ll -= scores_ll.max(axis=1, keepdims=True)
        np.exp(scores_ll, out=scores_ll)
        scores_ll /= scores_ll.sum(axis=1, keepdims=True)
        y_Cl = self._product(f"{name}.proj_out", v_Cl @ scores_ll.T)
        return x_Chh + y_Cl.reshape(x_Chh.shape)

    def _norm(self, x_Chh: np.ndarray, name: str) -> np.ndarray:
        grouped = x_Chh.reshape(GROUPS, -1)
        mean = grouped.mean(axis=1, keepdims=True, dtype=np.float64)
        variance = grouped.var(axis=1, keepdims=True, dtype=np.float64)
        scale = 1 / np.sqrt(variance + NORM_EPS)
        normed = grouped * scale.astype(np.float32) - (mean * scale).astype(np.float32)
        weight_C, bias_C = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return normed.reshape(x_Chh.shape) * weight_C[:, None, None] + bias_C[:, None, None]

    def _conv(self, x_Chh: np.ndarray, name: str) -> np.ndarray:
        """3×3, padded with zeros: a product with the nine shifted maps."""
        C, h, w = x_Chh.shape
        padded = np.pad(x_Chh, ((0, 0), (1, 1), (1, 1)))
        shifted = np.empty((C, 3, 3, h, w), dtype=np.float32)
        for i in range(3):
            for j in range(3):
                shifted[:, i, j] = padded[:, i : i + h, j : j + w]
        return self._product(name, shifted.reshape(9 * C, h * w)).reshape(-1, h, w)

    def _product(self, name: str, x_Kl: np.ndarray) -> np.ndarray:
        """weight [O, K]·x + bias, output channels shared out among the workers."""
        weight_O, bias_O = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        weight_OK = weight_O.reshape(len(weight_O), -1)
        out_Ol = np.empty((len(weight_OK), x_Kl.shape[1]), dtype=np.float32)

        def rows(_: int, first: int, last: int) -> None:
            np.matmul(weight_OK[first:last], x_Kl, out=out_Ol[first:last])
            out_Ol[first:last] += bias_O[first:last, None]

        self._workers.share(len(out_Ol), rows)
        return out_Ol


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # e^−x of a very negative x is infinite, and x over it is 0, as it should be
        return x / (1 + np.exp(-x))
