"""What each precision stores and computes: integers exactly, float32 where it must stay, whole bundles by the gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import var_deploy
from var_deploy.bundle import WEIGHTS, Bundle
from var_deploy.cli import app
from var_deploy.engines import Graphs
from var_deploy.errors import BundleError, CheckpointError, RequestError
from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec, TensorSpec, graph_specs
from var_export.bundle import bundle_from_checkpoint, write_bundle
from var_export.deploy_view import LazyWeight, deploy_weights
from var_export.graph_builder import GraphBuilder
from var_export.precision import product, stored_weights
from var_export.verify import MAX_MEAN_KL, verify_bundle
from var_export.weights_file import weights_layout, write_weights
from var_train.checkpoint import CheckpointPair

LOWER = (Precision.FP16, Precision.BF16, Precision.INT8)
PAIRS = ("tiny", "shared_aln")
HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}

Exported = Callable[[str, Precision], Path]


@pytest.fixture(scope="module")
def exported(tiny_pair, shared_aln_pair, tmp_path_factory) -> Exported:
    """`exported(pair, precision)`: the bundle of a golden pair, made once; read only."""
    made: dict[tuple[str, Precision], Path] = {}

    def export(name: str, precision: Precision) -> Path:
        if (name, precision) not in made:
            _, var, vqvae = {"tiny": tiny_pair, "shared_aln": shared_aln_pair}[name]
            out = tmp_path_factory.mktemp(name) / precision
            made[name, precision] = bundle_from_checkpoint(var, vqvae, out, precision=precision)
        return made[name, precision]

    return export


def stored(bundle: Path) -> dict[str, torch.Tensor]:
    with safe_open(bundle / WEIGHTS, framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    specs = Bundle.open(bundle, verify_digests=False).manifest.graphs
    return {name: onnx.load(bundle / spec.file, load_external_data=False) for name, spec in specs.items()}


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_int8_matrices_are_the_nearest_integers_within_63(exported, tiny_bundle, shared_aln_bundle, name):
    exact, got = stored({"tiny": tiny_bundle, "shared_aln": shared_aln_bundle}[name]), stored(exported(name, "int8"))
    quantized = {key for key, tensor in got.items() if tensor.dtype == torch.int8}
    config = Bundle.open(exported(name, Precision.INT8)).manifest.var
    projections = 1 if config.shared_aln else config.depth
    assert len(quantized) == 4 * config.depth + projections + 2  # products of blocks, AdaLN, and both of the head
    for key, tensor in got.items():
        if key in quantized:
            scale_N, weight_KN = got[key.replace(".weight", ".column_scale")], exact[key]
            assert tensor.abs().max() == 63
            assert torch.equal(tensor.abs().amax(0), torch.full_like(tensor[0], 63)), f"{key}: a scale is too large"
            assert torch.equal(scale_N, weight_KN.abs().amax(0) / 63), key
            # half a step, and the rounding of the quotient
            assert ((weight_KN - tensor * scale_N).abs() <= 0.5001 * scale_N).all(), key
        elif not key.endswith(".column_scale"):
            assert torch.equal(tensor, exact[key]), key
    assert got.keys() - exact.keys() == {key.replace(".weight", ".column_scale") for key in quantized}


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", PAIRS)
def test_halves_are_the_nearest_and_float32_stays_where_it_is_read(
    exported, tiny_bundle, shared_aln_bundle, name, precision, dtype
):
    exact = stored({"tiny": tiny_bundle, "shared_aln": shared_aln_bundle}[name])
    got = stored(exported(name, Precision(precision)))
    assert got.keys() == exact.keys()
    kept = {key for key, tensor in got.items() if tensor.dtype == torch.float32}
    for key, tensor in got.items():
        assert torch.equal(tensor, exact[key] if key in kept else exact[key].to(dtype)), key
    assert {key for key in got if "norm" in key or key.startswith(("quantize.", "word_embed.", "position"))} <= kept
    assert max(exact[key].numel() for key in kept if not key.startswith(("quantize.", "position"))) < 16_000
    assert {"head.weight", "class_emb.weight", "blocks.1.ffn.fc1.bias", "decoder.conv_out.weight"} <= got.keys() - kept


def test_a_column_of_zeros_stays_zeros():
    weight_KN = torch.tensor([[0.0, 1.0], [0.0, -3.0]])
    both = stored_weights({"head.weight": LazyWeight((2, 2), lambda: weight_KN)}, Precision.INT8)
    np.testing.assert_array_equal(both["head.weight"].numpy(), [[0, 21], [0, -63]])
    np.testing.assert_array_equal(both["head.column_scale"].numpy(), [1, np.float32(3) / np.float32(63)])


@pytest.mark.parametrize(
    ("precision", "value", "message"),
    [
        ("int8", np.nan, "head.weight: holds values that are not finite, which int8 has not; export as fp32"),
        ("int8", np.inf, "head.weight: holds values that are not finite, which int8 has not; export as fp32"),
        ("fp16", 1e5, "head.weight: its largest magnitude is 100000, beyond fp16; export as fp32"),
        ("bf16", 3.4e38, "head.weight: its largest magnitude is 3.4e+38, beyond bf16; export as fp32"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_leave_nothing(odd_states, tmp_path, precision, value, message):
    var, vqvae, var_state, vqvae_state = odd_states("one_class")
    var_state["head.weight"][3, 5] = value
    with pytest.raises(CheckpointError) as refusal:
        write_bundle(CheckpointPair(var, vqvae, var_state, vqvae_state), tmp_path / "b", precision=Precision(precision))
    assert str(refusal.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("precision", "step"),
    [("fp8", "; export fp32, which the torch engine converts when it loads"), ("fp4", ""), ("atuo", ""), ("INT8", "")],
)
def test_a_precision_that_bundles_do_not_have_is_refused(tiny_pair, tmp_path, precision, step):
    with pytest.raises(BundleError) as refusal:
        bundle_from_checkpoint(*tiny_pair[1:], tmp_path / "b", precision=precision)
    assert str(refusal.value) == f"precision: got '{precision}', expected fp32, fp16, bf16, int8 or auto{step}"
    assert not list(tmp_path.iterdir())


# int8 products --------------------------------------------------------------------------------------------------------


def run_product(tmp_path: Path, x_MK: np.ndarray, weight_KN: np.ndarray, bias_N: np.ndarray) -> np.ndarray:
    """x·W + b of an int8 bundle by ONNX Runtime."""
    arrays = {"m.weight": weight_KN, "m.bias": bias_N}
    lazy = {key: LazyWeight(array.shape, lambda a=array: torch.from_numpy(a)) for key, array in arrays.items()}
    weights = stored_weights({"head" + key[1:]: weight for key, weight in lazy.items()}, Precision.INT8)
    layout = weights_layout(weights)
    write_weights(tmp_path / WEIGHTS, weights, layout)
    (K, N), x, y = weight_KN.shape, "x", "y"
    spec = GraphSpec("g.onnx", (TensorSpec(x, "float32", ("R", K)),), (TensorSpec(y, "float32", ("R", N)),))
    b = GraphBuilder(spec, layout, Precision.INT8)
    ir.save(b.model({y: product(b, b.input(x), "head")}), tmp_path / spec.file)
    onnx.checker.check_model(tmp_path / spec.file)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(tmp_path / spec.file, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {x: x_MK})[0]
    return result


def quantised(weight_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    peak_N = np.abs(weight_KN).max(0)
    scale_N = np.where(peak_N > 0, peak_N / np.float32(63), np.float32(1))
    return np.rint(weight_KN / scale_N).astype(np.int64), scale_N


@pytest.mark.parametrize(("M", "K", "N"), [(1, 64, 192), (2, 65, 61), (5, 250, 7), (33, 128, 96)])
def test_a_product_is_bit_for_bit_that_of_exact_integers(tmp_path, M, K, N):
    random = np.random.default_rng(M)
    x_MK = (random.standard_normal((M, K)) * random.lognormal(0, 3, (M, 1))).astype(np.float32)
    weight_KN, bias_N = (random.standard_normal(shape).astype(np.float32) for shape in ((K, N), (N,)))
    w_KN, column_N = quantised(weight_KN)
    row_M1 = np.abs(x_MK).max(1, keepdims=True) / np.float32(127)
    u_MK = np.rint(x_MK / row_M1).astype(np.int64) + 128
    assert np.isin(np.abs(u_MK - 128).max(1), 127).all()
    integers_MN = (u_MK - 128) @ w_KN
    expected_MN = integers_MN.astype(np.float32) * column_N * row_M1 + bias_N
    got_MN = run_product(tmp_path, x_MK, weight_KN, bias_N)
    np.testing.assert_array_equal(got_MN, expected_MN)
    relative = np.linalg.norm(got_MN - bias_N - x_MK @ weight_KN, axis=1) / np.linalg.norm(x_MK @ weight_KN, axis=1)
    assert relative.max() < 0.03  # 7 bits and 8 bits of normal numbers: about 1.8 %


def test_the_largest_integers_do_not_saturate(tmp_path):
    """All activations 255 and all weights ±63: pairs of products come closest to the end of 16 bits."""
    K, N = 4096, 64
    signs_KN = np.where(np.random.default_rng(0).random((K, N)) < 0.5, -1, 1)
    signs_KN[:, :2] = [1, -1]
    x_MK = np.stack([np.full(K, 127.0), np.where(np.arange(K) % 3, 127.0, -127.0)]).astype(np.float32)
    got_MN = run_product(tmp_path, x_MK, (63.0 * signs_KN).astype(np.float32), np.zeros(N, np.float32))
    expected_MN = x_MK.astype(np.int64) @ (63 * signs_KN)
    assert np.abs(expected_MN).max() == K * 127 * 63
    np.testing.assert_array_equal(got_MN, expected_MN.astype(np.float32))


def test_rows_of_nothing_or_next_to_nothing_give_the_bias(tmp_path):
    random = np.random.default_rng(1)
    x_MK = np.stack([np.zeros(64), np.full(64, 1e-38), np.full(64, -1e-42), np.ones(64)]).astype(np.float32)
    weight_KN, bias_N = random.standard_normal((64, 5)).astype(np.float32), np.arange(5, dtype=np.float32)
    got_MN = run_product(tmp_path, x_MK, weight_KN, bias_N)
    np.testing.assert_array_equal(got_MN[:3], np.stack([bias_N] * 3))
    assert np.abs(got_MN[3] - bias_N).min() > 0


def test_an_int8_image_does_not_depend_on_its_batch(exported):
    pipe = var_deploy.load(exported("tiny", Precision.INT8), engine="onnx", threads=1)
    engine, config = pipe.engine, pipe.bundle.manifest.var
    random, labels_8 = np.random.default_rng(0), np.arange(8)
    codes_8nC: list[Any] = [None]
    for n in config.tokens_per_scale[:-1]:
        # Rows of very different size: a scale that they shared would show.
        size_8 = 10.0 ** random.integers(-2, 2, (8, 1, 1))
        codes_8nC.append((size_8 * random.standard_normal((8, n, config.z_channels))).astype(np.float32))
    many = engine.begin(labels_8)
    expected = [engine.step(many, k, codes).copy() for k, codes in enumerate(codes_8nC)]
    for rows in ([5], [5, 1], [0, 7, 5]):
        state = engine.begin(labels_8[rows])
        for k, codes in enumerate(codes_8nC):
            got = engine.step(state, k, None if codes is None else codes[rows])
            np.testing.assert_array_equal(got, expected[k][rows], err_msg=f"rows {rows}, scale {k}")
    alone, beside = pipe.generate([3], seeds=[9]), pipe.generate([1, 3, 8], seeds=[4, 9, 2])
    np.testing.assert_array_equal(alone.pixels[0], beside.pixels[1])


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", PAIRS)
def test_signatures_types_and_names_are_those_declared(exported, name, precision):
    bundle = exported(name, precision)
    manifest = Bundle.open(bundle).manifest
    assert manifest.precision is precision
    assert dict(manifest.graphs) == graph_specs(manifest.var, manifest.vqvae, precision)
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    halves = set()
    for graph, model in graphs(bundle).items():
        onnx.checker.check_model(bundle / manifest.graphs[graph].file, full_check=True)
        assert all(node.name for node in model.graph.node)
        ours = {node.op_type for node in model.graph.node if node.domain}
        assert ours <= ({"MatMulIntegerToFloat"} if precision is Precision.INT8 else set()), graph
        assert len(model.opset_import) == 1 + bool(ours), graph
        for values, specs in (
            (model.graph.input, manifest.graphs[graph].inputs),
            (model.graph.output, manifest.graphs[graph].outputs),
        ):
            for value, spec in zip(values, specs, strict=True):
                if spec.dtype != "int64":
                    assert value.type.tensor_type.elem_type == types[spec.dtype], f"{graph}: {spec.name}"
                if spec.dtype not in ("int64", "float32"):
                    halves.add(spec.name.split(".")[0])
    expected = {"start", "modulation", "head_modulation", "cache_k", "cache_v"}
    assert halves == (set() if precision is Precision.INT8 else expected)


def float_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_halves_and_float32_are_each_where_they_belong(exported, precision):
    """Products, convolutions and attention read halves; norms, softmax, lengths, resampling and logits are float32."""
    half = {"Attention", "TensorScatter", "Gelu"}
    wide = {"LayerNormalization", "InstanceNormalization", "Softmax", "ReduceL2", "Sigmoid", "Clip"}
    for graph, model in graphs(exported("tiny", precision)).items():
        types, halves_of_products = float_types(model), 0
        for node in model.graph.node:
            inputs = {types[name] for name in node.input if types.get(name, TensorProto.INT64) != TensorProto.INT64}
            if node.op_type in half:
                assert inputs <= HALVES, f"{graph}: {node.name}"
            if node.op_type in wide:
                assert inputs == {TensorProto.FLOAT}, f"{graph}: {node.name}"
            if node.op_type == "Conv":
                assert (inputs <= HALVES) == (graph in ("decoder", "encoder")), f"{graph}: {node.name}"
            halves_of_products += node.op_type == "MatMul" and inputs <= HALVES
            if node.op_type == "Cast":
                assert types[node.input[0]] != types[node.output[0]], f"{graph}: {node.name} does nothing"
        # 4 products of 2 blocks; AdaLN of 2 blocks and the head; 3 attentions of 2 products beside the middle's
        expected = {"condition": 3, "finish": 0, "decoder": 2 * 4, "encoder": 2 * 3}
        assert halves_of_products == expected.get(graph, 8), graph


def test_bf16_graphs_are_the_fp16_graphs_in_another_type(exported):
    """So what ONNX Runtime's CPU kernels show of fp16 holds for bf16, which they do not run."""

    def anonymous(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
        kinds = {TensorProto.BFLOAT16: TensorProto.FLOAT16}
        return [
            (
                node.op_type,
                node.name,
                [name.replace("bfloat16", "float16").partition("const.float16")[0] for name in node.input],
                [(a.name, kinds.get(a.i, a.i) if a.name == "to" else a.SerializeToString()) for a in node.attribute],
            )
            for node in model.graph.node
        ]

    fp16, bf16 = (graphs(exported("tiny", precision)) for precision in (Precision.FP16, Precision.BF16))
    for graph in fp16:
        assert anonymous(bf16[graph]) == anonymous(fp16[graph]), graph


# Bundles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", Graphs)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("precision", "largest_kl", "least_psnr"),
    # fp16: 2^-11 of every activation. int8: the gate of `verify`; its decoder is float32.
    [(Precision.FP16, 1e-4, 60), (Precision.INT8, MAX_MEAN_KL, 90)],
)
def test_logits_and_pixels_stay_close_to_the_published_code(
    exported, tiny_pair, shared_aln_pair, name, precision, graphs, largest_kl, least_psnr
):
    golden = {"tiny": tiny_pair, "shared_aln": shared_aln_pair}[name][0]
    pipe = var_deploy.load(exported(name, precision), engine="onnx", graphs=graphs, threads=1)
    engine, config, labels = pipe.engine, pipe.bundle.manifest.var, golden.config["labels"]
    codebook_VC = pipe.bundle.weight("quantize.embedding.weight")
    state, codes_RnC = engine.begin(np.array(labels + [config.null_class] * len(labels))), None
    differs = 0.0
    for k in range(config.num_scales):
        logits_RnV, expected_RnV = engine.step(state, k, codes_RnC), golden[f"logits.{k}"]
        assert logits_RnV.dtype == np.float32
        assert mean_kl(expected_RnV, logits_RnV, 1.5 * config.ratio(k)) < largest_kl, f"scale {k}"
        differs = max(differs, float(np.abs(logits_RnV - expected_RnV).max()))
        codes_RnC = np.tile(codebook_VC[golden[f"tokens.{k}"]], (2, 1, 1))
    assert differs > 5e-4, "as good as float32, so the precision was not used"
    pixels = engine.decode(engine.finish(state, codes_RnC[: len(labels)]))
    assert -10 * np.log10(np.square(pixels - golden["image"], dtype=np.float64).mean()) > least_psnr


def mean_kl(expected_RnV: np.ndarray, got_RnV: np.ndarray, t: float) -> float:
    """KL(expected ‖ got) of the distributions under guidance t, mean over tokens, in nats."""

    def log_probabilities(logits_RnV: np.ndarray) -> torch.Tensor:
        conditioned_BnV, null_BnV = torch.from_numpy(logits_RnV).double().chunk(2)
        return ((1 + t) * conditioned_BnV - t * null_BnV).log_softmax(-1)

    expected, got = log_probabilities(expected_RnV), log_probabilities(got_RnV)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def test_verify_holds_a_lower_precision_to_the_gate(exported, tiny_pair, tmp_path):
    bundle = Path(shutil.copytree(exported("tiny", Precision.INT8), tmp_path / "bundle"))
    parity = verify_bundle(bundle, *tiny_pair[1:], labels=[3])
    assert (parity.engine, parity.precision, parity.exact, parity.passed) == ("onnx", "int8", False, True)
    assert max(row.logit_error for rows in parity.scales.values() for row in rows) > parity.tolerance
    with pytest.raises(RequestError, match=r"tolerance: precision int8 is held to a gate .*; leave it out"):
        verify_bundle(bundle, *tiny_pair[1:], labels=[3], tolerance=0.5)


def test_export_takes_a_precision_by_name(tiny_pair, tiny_bundle, exported, tmp_path):
    def export(precision: str) -> Any:
        paths = ["--var", str(tiny_pair[1]), "--vae", str(tiny_pair[2]), "--out", str(tmp_path / precision)]
        return CliRunner().invoke(app, ["export", *paths, "--precision", precision])

    assert export("int8").exit_code == 0
    for file in (tmp_path / "int8").iterdir():
        assert file.read_bytes() == (exported("tiny", Precision.INT8) / file.name).read_bytes(), file.name
    assert isinstance(refusal := export("fp8").exception, BundleError)
    assert "precision: got 'fp8'" in str(refusal)


def test_weights_take_the_bytes_of_their_type(exported, tiny_bundle):
    size = {p: (exported("tiny", p) / WEIGHTS).stat().st_size for p in LOWER}
    fp32, specs = (tiny_bundle / WEIGHTS).stat().st_size, Bundle.open(tiny_bundle).weight_sizes()
    quantised = sum(n for key, n in specs.items() if key.startswith(("blocks.", "head")) and key.endswith(".weight"))
    assert size[Precision.INT8] < fp32 - 2.9 * quantised
    assert size[Precision.FP16] == size[Precision.BF16] < 0.6 * fp32


def test_every_weight_is_read_or_kept_for_the_runtime(exported):
    """In lower precision too, and no float32 copy lies beside it."""
    for precision in LOWER:
        names = {t.name for m in graphs(exported("tiny", precision)).values() for t in m.graph.initializer}
        read = {name.partition("[")[0] for name in names}
        assert stored(exported("tiny", precision)).keys() - read == {"quantize.embedding.weight"}


def test_the_deploy_view_is_what_fp32_stores(tiny_checkpoints):
    weights = deploy_weights(tiny_checkpoints)
    assert stored_weights(weights, Precision.FP32) == weights


# What inspect says ----------------------------------------------------------------------------------------------------


def inspected(bundle: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["inspect", str(bundle), "--batch", "3", *options])


@pytest.mark.parametrize("precision", LOWER)
def test_inspect_counts_stored_bytes_and_says_that_a_precision_is_approximate(exported, tiny_bundle, precision):
    bundle = exported("tiny", precision)
    data, exact = (json.loads(inspected(path, "--json").stdout) for path in (bundle, tiny_bundle))
    assert (data["precision"], data["exact"], exact["exact"]) == (precision, False, True)
    assert data["parameters"] == exact["parameters"]
    assert "torch" not in data  # whose engine reads fp32
    weights = {name: tensor for name, tensor in stored(bundle).items() if not name.startswith(("enc", "quant_conv"))}
    if precision is Precision.BF16:
        assert "memory" not in data  # nothing runs it on a CPU
    else:
        (plan,), (exact_plan,) = data["memory"], exact["memory"]
        # ONNX Runtime's CPU kernels make float32 of halves when it loads.
        element = None if precision is Precision.INT8 else 4
        assert plan["weights"] == sum(x.numel() * (element or x.element_size()) for x in weights.values())
        assert plan["caches"] == exact_plan["caches"] // (1 if precision is Precision.INT8 else 2)
    assert f"{precision}, approximate" in inspected(bundle).stdout


@pytest.mark.parametrize("option", [["--precision", "bf16"], ["--smooth"], ["--decode-slice", "2"]])
def test_inspect_has_no_plan_of_the_torch_engine_for_a_lower_precision(exported, option):
    bundle = exported("tiny", Precision.INT8)
    error = inspected(bundle, *option).exception
    assert isinstance(error, RequestError)
    needs = f"{bundle}: the torch engine's plan needs an fp32 bundle, got int8"
    assert str(error) == f"{needs}; leave out {option[0]}"


def test_weights_of_a_foreign_type_are_named(tiny_copy, reseal):
    weights = {**stored(tiny_copy), "head.bias": torch.zeros(256, dtype=torch.float64)}
    save_file(weights, tiny_copy / WEIGHTS)
    reseal(tiny_copy, WEIGHTS)
    error = inspected(tiny_copy).exception
    assert isinstance(error, BundleError)
    assert str(error) == f"{tiny_copy / WEIGHTS}: holds F64, known: F32, F16, BF16, I8; export it again"
