"""The plan of static buffers is what the torch engine allocates: every name, shape, type and byte of it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_deploy import static_buffers as plan
from var_deploy.config import VARConfig, VQVAEConfig
from var_deploy.engines.torch.buffers import Buffers, DecodeBuffers, Packed
from var_deploy.precision import Precision
from var_deploy.sampling import Settings
from var_deploy.signature import TensorSpec

Configs = tuple[VARConfig, VQVAEConfig]

#: Shapes without memory: every size can be tried.
META = torch.device("meta")


@st.composite
def configs(draw: st.DrawFn) -> Configs:
    """Configurations that depart from the published shape in every way that one may."""

    def upto(most: int) -> int:
        return draw(st.integers(1, most))

    both: dict[str, Any] = {
        "patch_nums": tuple(sorted(draw(st.sets(st.integers(1, 20), min_size=2, max_size=6)))),
        "vocab_size": upto(97),
        "z_channels": upto(33),
    }
    var = VARConfig(
        **both,
        num_classes=upto(7),
        depth=upto(4),
        embed_dim=64 * upto(3),
        ffn_dim=upto(300),
        shared_aln=draw(st.booleans()),
        attn_l2_norm=draw(st.booleans()),
    )
    ch_mult = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    return var, VQVAEConfig(**both, ch=32 * upto(2), ch_mult=ch_mult, num_phi=upto(5))


def _buffers(var: VARConfig, batch: int, guided: bool, precision: Precision, smooth: bool, device: torch.device) -> Any:
    return Buffers(var, batch=batch, guided=guided, precision=precision, device=device, smooth=smooth)


def _sides(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(side) for side in spec.shape)


def _as_planned(spec: TensorSpec, tensor: torch.Tensor) -> None:
    assert tuple(tensor.shape) == _sides(spec), spec.name
    assert tensor.dtype is getattr(torch, spec.dtype), spec.name
    assert tensor.is_contiguous(), spec.name
    assert plan.nbytes([spec]) == tensor.numel() * tensor.element_size(), spec.name


# ---- names, shapes and types -----------------------------------------------------------------------------------------

choices = given(
    models=configs(),
    batch=st.integers(1, 5),
    guided=st.booleans(),
    smooth=st.booleans(),
    precision=st.sampled_from(Precision),
)


@choices
@settings(max_examples=60)
def test_every_spec_is_an_attribute_of_its_shape_and_type(models, batch, guided, smooth, precision):
    var, vqvae = models
    buffers = _buffers(var, batch, guided, precision, smooth, META)
    assert (buffers.batch, buffers.rows) == (batch, 2 * batch if guided else batch)
    packed = [*plan.input_specs(var, batch, buffers.rows), *plan.output_specs(var, batch)]
    work = plan.work_specs(var, batch, buffers.rows, precision, smooth)
    names = [spec.name for spec in [*packed, *work]]
    assert len(set(names)) == len(names)
    tensors = {name.removeprefix("_"): value for name, value in vars(buffers).items() if torch.is_tensor(value)}
    tensors |= {f"codes_BnC.{k}": buffers.codes(k) for k in range(var.num_scales)}
    assert tensors.keys() == set(names)  # nothing is allocated beside the plan
    for spec in [*packed, *work]:
        _as_planned(spec, tensors[spec.name])
    for spec in packed:
        host = {**buffers.inputs.host, **buffers.outputs.host}[spec.name]
        assert (host.shape, str(host.dtype)) == (_sides(spec), spec.dtype)
    decode = DecodeBuffers(vqvae, batch, META)
    for spec in plan.decode_specs(vqvae, batch):
        _as_planned(spec, getattr(decode, spec.name))


@choices
@settings(max_examples=60)
def test_views_of_a_scale_lie_within_their_buffers(models, batch, guided, smooth, precision):
    """Slicing past the end would be silent; a view of a wrong size is not."""
    var, _ = models
    buffers = _buffers(var, batch, guided, precision, smooth, META)
    V, C, D = var.vocab_size, var.z_channels, var.embed_dim
    for k, n in enumerate(var.tokens_per_scale):
        for rows in {batch, buffers.rows}:
            assert buffers.tokens_in(k, rows).shape == (rows * n, D)
            assert buffers.logits(k, rows).shape == (rows, n, V)
        assert buffers.codes(k).shape == (batch, n, C)
        weights = buffers.smooth_weights(k)
        assert (weights is not None) == smooth
        assert weights is None or weights.shape == (batch, n, V)
        assert buffers.f_hat_BlC(k).shape == (batch, var.latent_size**2, C)
    assert (buffers.quantized_MK is not None) == (buffers.row_scale_M1 is not None) == (precision is Precision.FP8)


def test_two_consecutive_feature_maps_do_not_share_memory():
    var = VARConfig(patch_nums=(1, 2, 3), vocab_size=9, num_classes=2, depth=1, embed_dim=64, ffn_dim=64)
    buffers = _buffers(var, 2, True, Precision.FP32, False, torch.device("cpu"))
    for k in range(3):
        before, after = buffers.f_hat_BlC(k), buffers.f_hat_BlC(k + 1)
        before.fill_(1.0)
        after.fill_(2.0)
        assert (before == 1.0).all()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision.FP32, "float32"),
        (Precision.FP16, "float16"),
        (Precision.BF16, "bfloat16"),
        (Precision.INT8, "bfloat16"),
        (Precision.FP8, "bfloat16"),
    ],
)
def test_activations_have_the_type_of_the_precision(precision, dtype):
    assert plan.activation_dtype(precision) == dtype
    assert getattr(torch, dtype).itemsize == precision.activation_bytes


def test_bytes_of_a_type_are_those_of_torch():
    for name, size in plan._BYTES.items():
        assert getattr(torch, name).itemsize == size
        assert plan.nbytes([TensorSpec("x", name, (3, 5))]) == 15 * size


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _padding(packed: Packed, specs: list[TensorSpec]) -> int:
    """Bytes of a block that belong to no tensor."""
    padding = packed._device_block.numel() - plan.nbytes(specs)
    assert 0 <= padding < 16 * len(specs)
    assert packed._host_block.numel() == packed._device_block.numel()
    return padding


@choices
@settings(max_examples=60)
def test_the_plan_counts_every_byte_that_is_allocated(models, batch, guided, smooth, precision):
    var, vqvae = models
    buffers, decode = _buffers(var, batch, guided, precision, smooth, META), DecodeBuffers(vqvae, batch, META)
    storages = {}
    for owner in (buffers, decode):
        for value in vars(owner).values():
            for tensor in value if isinstance(value, list) else [value]:
                if torch.is_tensor(tensor):
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    inputs, outputs = plan.input_specs(var, batch, buffers.rows), plan.output_specs(var, batch)
    padding = _padding(buffers.inputs, inputs) + _padding(buffers.outputs, outputs)
    padding += _padding(decode.pictures, plan.decode_specs(vqvae, batch)[2:])
    for images in {1, batch}:
        estimate = plan.decoder_activation_bytes(vqvae, images, precision)
        planned = plan.generation_bytes(
            var, vqvae, batch, precision, guided=guided, smooth=smooth, decode_slice=images if images < batch else None
        )
        assert planned == sum(storages.values()) - padding + estimate


def test_the_decoders_estimate_grows_with_images_and_halves_with_the_type():
    vqvae = VQVAEConfig(patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096)
    one = plan.decoder_activation_bytes(vqvae, 1, Precision.FP32)
    assert one == 4 * 4 * 160 * 256**2  # the widest map is the last: 160 channels of 256 × 256 in float32
    assert plan.decoder_activation_bytes(vqvae, 3, Precision.FP32) == 3 * one
    assert plan.decoder_activation_bytes(vqvae, 1, Precision.INT8) == one // 2
    widening = VQVAEConfig(patch_nums=(1, 2, 3, 4), vocab_size=64, ch=32, ch_mult=(1, 2))
    assert plan.decoder_activation_bytes(widening, 1, Precision.FP32) == 4 * 4 * 64 * 8**2  # 64 channels, enlarged


def test_batches_run_in_the_next_bucket():
    expected = {1: 1, 2: 2, 3: 4, 5: 8, 9: 16, 17: 32, 33: 64, 64: 64, 65: 128, 129: 192}
    assert {batch: plan.bucket_of(batch) for batch in expected} == expected


def test_the_decoder_takes_no_more_images_than_its_maps_can_count():
    of_256 = VQVAEConfig(patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096)
    of_512 = VQVAEConfig(patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), vocab_size=4096)
    assert plan.decoded_at_once(of_256, 64, None) == 64
    assert plan.decoded_at_once(of_512, 64, None) == 51  # 160 channels of 512 × 512: 52 images pass 2³¹ elements
    assert plan.decoded_at_once(of_512, 8, None) == 8
    assert plan.decoded_at_once(of_512, 8, 3) == 3
    assert plan.decoded_at_once(of_512, 2, 3) == 2


def test_the_published_caches_are_most_of_a_large_batch():
    """d16 at batch 64 under guidance: keys and values × 16 blocks × 128 rows × 16 heads × 680 tokens × 64 × 2 bytes."""
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    var = VARConfig(patch_nums=scales, vocab_size=4096, num_classes=1000, depth=16, embed_dim=1024, ffn_dim=4096)
    work = {spec.name: spec for spec in plan.work_specs(var, 64, 128, Precision.BF16, False)}
    caches = plan.nbytes([work["caches_i2RHLd"]])
    assert caches == 2 * 16 * 128 * 16 * 680 * 64 * 2
    assert caches < plan.nbytes(work.values()) < 1.25 * caches


# ---- packed tensors --------------------------------------------------------------------------------------------------

DTYPES = ["float64", "float32", "float16", "uint8", "int32", "int64"]
shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(kinds=st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=8))
def test_packed_views_are_aligned_and_do_not_overlap(kinds):
    specs = [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(kinds)]
    packed = Packed(specs, torch.device("cpu"))
    block = packed._device_block
    assert packed.device.keys() == packed.host.keys() == {spec.name for spec in specs}
    places = []
    for spec in specs:
        view = packed.device[spec.name]
        _as_planned(spec, view)
        begin = view.data_ptr() - block.data_ptr()
        assert begin % 16 == 0
        places.append((begin, begin + view.numel() * view.element_size()))
        host = packed.host[spec.name]
        assert host.ctypes.data - packed._host_block.data_ptr() == begin  # the twin has the same layout
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert places[-1][1] <= block.numel()
    assert not block.any()  # rows that pad a batch run too


def test_one_copy_carries_all_tensors_each_way():
    specs = [TensorSpec("a", "int64", (3,)), TensorSpec("b", "float32", (2, 5)), TensorSpec("c", "uint8", (7,))]
    packed = Packed(specs, torch.device("cpu"))
    for i, spec in enumerate(specs):
        size = math.prod(_sides(spec))
        packed.host[spec.name][...] = (np.arange(size) + 10 * i).reshape(_sides(spec))
    assert not packed._device_block.any()
    packed.upload()
    for i, spec in enumerate(specs):
        expected = torch.arange(math.prod(_sides(spec))).view(_sides(spec)) + 10 * i
        assert (packed.device[spec.name] == expected).all()
        packed.device[spec.name].add_(1)
    packed.download()
    for i, spec in enumerate(specs):
        assert packed.host[spec.name].flat[0] == 10 * i + 1


def test_a_request_fills_its_inputs_and_spare_images_are_greedy_ones_of_class_0():
    var = VARConfig(patch_nums=(1, 2), vocab_size=50, num_classes=9, depth=1, embed_dim=64, ffn_dim=64)
    guided = _buffers(var, 4, True, Precision.FP32, False, torch.device("cpu"))
    asked = Settings(
        strengths=(0.5, 2.0), temperatures=(0.7, 1.5), top_ks=(10**12, 3), top_ps=(0.9, 0.0), smooths=(False, True)
    )
    guided.fill(np.array([8, 3, 5]), [0, 2**63, 2**64 - 1], asked)
    host = guided.inputs.host
    assert host["labels_R"].tolist() == [8, 3, 5, 0, 9, 9, 9, 9]  # the null class is the one after the last
    assert host["seeds_B"].view(np.uint64)[:3].tolist() == [0, 2**63, 2**64 - 1]
    np.testing.assert_array_equal(host["strength_KB"], np.float32([[0.5] * 4, [2.0] * 4]))
    np.testing.assert_array_equal(host["temperature_KB"], np.float32([[0.7] * 4, [1.5] * 4]))
    # More than there are means all; int32 would not hold it.
    assert host["top_k_KB"].tolist() == [[50, 50, 50, 1], [3, 3, 3, 1]]
    np.testing.assert_array_equal(host["top_p_KB"], np.float32([[0.9] * 4, [0.0] * 4]))
    guided.fill(np.array([1]), [7], Settings.constant((0.0, 0.0), top_k=0, top_p=0.0))
    assert host["labels_R"].tolist() == [1, 0, 0, 0, 9, 9, 9, 9]
    assert host["top_k_KB"].tolist() == [[0, 1, 1, 1]] * 2
    unguided = _buffers(var, 2, False, Precision.FP32, False, torch.device("cpu"))
    unguided.fill(np.array([4, 6]), [1, 2], asked)
    assert unguided.inputs.host["labels_R"].tolist() == [4, 6]


def test_before_any_request_every_input_can_run():
    """A capture runs once on them: classes in range, and no division by a temperature of 0."""
    var = VARConfig(patch_nums=(1, 2), vocab_size=50, num_classes=9, depth=1, embed_dim=64, ffn_dim=64)
    buffers = _buffers(var, 2, True, Precision.FP32, False, torch.device("cpu"))
    assert not buffers.labels_R.any()
    assert (buffers.temperature_KB == 1).all()
