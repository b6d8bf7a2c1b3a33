"""Decoder and encoder graphs against the reference VQVAE, for several numbers of levels and widths."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import torch

OPERATORS = {
    *("Add", "Mul", "Conv", "Sigmoid", "InstanceNormalization", "Reshape", "Shape", "Unsqueeze"),
    *("Split", "Transpose", "MatMul", "Softmax"),
}


def run(odd, name: str, array: np.ndarray) -> np.ndarray:
    spec = odd.bundle.manifest.graphs[name]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    runner = ort.InferenceSession(odd.bundle.file(spec.file), options, providers=["CPUExecutionProvider"])
    return runner.run(None, {spec.inputs[0].name: array})[0]


@torch.no_grad()
def test_decoder_equals_the_reference(odd):
    config = odd.vqvae.config
    shape = (2, config.z_channels, config.latent_size, config.latent_size)
    f_hat = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got, expected = run(odd, "decoder", f_hat.numpy()), (odd.vqvae.decode(f_hat) + 1) / 2
    assert got.shape == (2, 3, config.image_size, config.image_size)
    # float32 through some twenty convolutions; pixels are in [0, 1].
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=0)
    assert got.std() > 0.01, "the picture is flat, so the comparison shows nothing"


@torch.no_grad()
def test_decoder_clamps_to_the_unit_range(odd):
    config = odd.vqvae.config
    shape = (64, config.z_channels, config.latent_size, config.latent_size)
    f_hat = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    # The decoder normalises its input, so the pictures differ in shape, not in strength; take the extreme ones.
    raw = torch.cat([odd.vqvae.decoder(odd.vqvae.post_quant_conv(one)) for one in f_hat.split(1)])
    darkest, brightest = raw.flatten(1).min(1).values.argmin(), raw.flatten(1).max(1).values.argmax()
    assert raw[darkest].min() < -1.05, "nothing to clamp"
    assert raw[brightest].max() > 1.05, "nothing to clamp"
    got = run(odd, "decoder", torch.stack([f_hat[darkest], f_hat[brightest]]).numpy())
    assert got[0].min() == 0.0
    assert got[1].max() == 1.0


@torch.no_grad()
def test_encoder_equals_the_reference(odd):
    config = odd.vqvae.config
    pixels = torch.rand(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(2))
    got, expected = run(odd, "encoder", pixels.numpy()), odd.vqvae.encode(2 * pixels - 1)
    assert got.shape == (2, config.z_channels, config.latent_size, config.latent_size)
    # float32 through some twenty convolutions; features are of size 1.
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_only_operators_that_every_engine_has_are_used(odd):
    resize = {"Resize"} if len(odd.vqvae.config.ch_mult) > 1 else set()
    for name, extra in (("decoder", {"Clip", *resize}), ("encoder", {"Sub"})):
        graph = onnx.load(odd.bundle.file(f"{name}.onnx"), load_external_data=False).graph
        used = {node.op_type for node in graph.node}
        assert used == OPERATORS | extra, name
        assert not [node for node in graph.node if node.domain]
