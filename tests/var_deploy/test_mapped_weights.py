"""Weights over the mapped file: the bundle's, of every type, and what is no weights file."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from var_deploy.bundle import WEIGHTS, Bundle
from var_deploy.errors import BundleError
from var_deploy.mapped_weights import mapped_weights

#: JSON that no parser should follow to its end.
NESTED = (100_000).to_bytes(8, "little") + b"[" * 100_000


def test_are_the_bundle_s(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    mapped = mapped_weights(tiny_bundle / WEIGHTS)
    assert mapped.keys() == bundle.weight_sizes().keys()
    for name in ("word_embed.weight", "decoder.conv_out.bias"):
        np.testing.assert_array_equal(mapped[name], bundle.weight(name))
        assert not mapped[name].flags.writeable


def test_every_type(tmp_path):
    tensors = {
        "a": np.arange(3, dtype=np.int8),
        "b": np.ones((2, 3), dtype=np.float16),
        "c": np.ones((), dtype=np.float32),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "np"})
    mapped = mapped_weights(tmp_path / "w.safetensors")
    assert mapped.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(mapped[name], expected)


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x09" + bytes(7) + b'{"a": {}}', NESTED]
)
def test_damaged(content, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"w\.safetensors: not a readable weights file \(.*\); copy or export"):
        mapped_weights(path)
