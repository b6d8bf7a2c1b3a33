"""Every graph of the transformer against the reference, tensor by tensor, and against the rules that engines set.

Axes as in `var_deploy.signature`. Caches start as NaN, so reading a position before it was written, or writing one
that is not the scale's own, shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from var_deploy.signature import cache_names, graph_specs, scale_graph_name
from var_export.bundle import write_bundle
from var_train import VAR
from var_train.checkpoint import CheckpointPair

# float32, sums in another order through up to three blocks; logits of these models are of size 1 to 10.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}

#: Everything a scale graph may be made of: what ONNX Runtime and the TensorRT importer both take.
SCALE_OPERATORS = {
    *("Add", "Mul", "Div", "Max", "MatMul", "Conv", "Gelu", "ReduceL2", "LayerNormalization", "Attention"),
    *("TensorScatter", "Transpose", "Reshape", "Split", "Slice", "Gather", "Shape", "ConstantOfShape"),
}
SYMBOLIC_OPERATORS = SCALE_OPERATORS - {"ConstantOfShape"} | {"Concat", "Squeeze", "Cast", "Min", "Expand"}
CONDITION_OPERATORS = {"Gather", "Mul", "Sigmoid", "MatMul", "Add", "Reshape", "Concat", "Unsqueeze"}
FINISH_OPERATORS = {"Transpose", "Reshape", "MatMul", "Conv", "Add"}


@dataclass(frozen=True)
class Expected:
    """What the reference computes for fixed tokens: 3 labels, each scale's inputs and results."""

    labels: torch.Tensor
    start: torch.Tensor
    modulation: torch.Tensor
    head_modulation: torch.Tensor
    codes: list[torch.Tensor]  # per scale [R, n_k, C]
    f_hat: list[torch.Tensor]  # per scale, the sum of all scales before it
    logits: list[torch.Tensor]
    caches: dict[str, torch.Tensor]  # after the last scale [R, H, L, 64]


@torch.no_grad()
def modulations(var: VAR, cond_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's modulations with 1 added to the scales: [R, depth, 6, D] and [R, 2, D]."""
    R, D = cond_RD.shape
    shared = var.shared_ada_lin(cond_RD).view(R, 1, 6, D) if var.config.shared_aln else None
    modulation = torch.cat([block.modulation(cond_RD, shared) for block in var.blocks], dim=1).clone()
    modulation[:, :, 2:4] += 1
    head = var.head_nm.ada_lin(cond_RD).view(R, 2, D).clone()
    head[:, 0] += 1
    return modulation, head


@pytest.fixture(scope="session")
def expected(odd) -> Expected:
    var, quantize, config = odd.var, odd.vqvae.quantize, odd.var.config
    labels = torch.tensor([0, config.num_classes - 1, config.null_class])
    random = torch.Generator().manual_seed(5)
    tokens = [torch.randint(config.vocab_size, (3, n), generator=random) for n in config.tokens_per_scale]
    with torch.no_grad():
        codes = [quantize.embedding(t) for t in tokens]
        f_hat = [torch.zeros(3, config.z_channels, config.latent_size, config.latent_size)]
        f_hat += [quantize.features_from_tokens(tokens[: k + 1]) for k in range(config.num_scales)]
        cond, cache, logits = var.condition(labels), [], []
        start = var.embed_start(cond)
        for k in range(config.num_scales):
            x = start if k == 0 else var.embed_scale(k, quantize.next_features(k, f_hat[k]))
            scale_logits, cache = var.forward_scale(x, cond, cache)
            logits.append(scale_logits)
    caches = dict(zip(cache_names(config.depth), [tensor for pair in cache for tensor in pair], strict=True))
    return Expected(labels, start, *modulations(var, cond), codes, f_hat, logits, caches)


def session(odd, name: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    path = odd.bundle.file(odd.bundle.manifest.graphs[name].file)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, **feeds: torch.Tensor | np.ndarray) -> dict[str, np.ndarray]:
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in feeds.items()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def close(got: np.ndarray, reference: torch.Tensor, what: str) -> None:
    np.testing.assert_allclose(got, reference.numpy(), **TOLERANCE, err_msg=what)


# Values ---------------------------------------------------------------------------------------------------------------


def test_condition_equals_the_reference(odd, expected):
    got = run(session(odd, "condition"), labels=expected.labels)
    close(got["modulation"], expected.modulation, "modulation")
    close(got["head_modulation"], expected.head_modulation, "head_modulation")
    close(got["start"], expected.start, "start")


@pytest.mark.parametrize("graphs", ["static", "symbolic"])
def test_each_scale_equals_the_reference_and_touches_only_its_own_cache(odd, expected, graphs):
    config, R = odd.var.config, len(expected.labels)
    cache_shape = (R, config.num_heads, config.num_tokens, 64)
    caches = {name: np.full(cache_shape, np.nan, dtype=np.float32) for name in cache_names(config.depth)}
    symbolic = session(odd, "scales") if graphs == "symbolic" else None
    given = {"modulation": expected.modulation, "head_modulation": expected.head_modulation}
    for k in range(config.num_scales):
        feeds = {**given, **caches}
        if k > 0:
            feeds |= {"codes": expected.codes[k - 1], "f_hat": expected.f_hat[k - 1]}
        if k == 0 or symbolic:
            feeds |= {"start": expected.start}
        if symbolic:
            feeds |= {"scale": np.array([k])}
        if symbolic and k == 0:  # any codes are ignored there
            codes = torch.randn(R, config.tokens_per_scale[0], config.z_channels)
            feeds |= {"codes": codes, "f_hat": expected.f_hat[0]}
        got = run(symbolic or session(odd, scale_graph_name(k)), **feeds)
        close(got["logits"], expected.logits[k], f"scale {k}: logits")
        if symbolic or k > 0:
            close(got["f_hat.out"], expected.f_hat[k], f"scale {k}: f_hat")
        end = config.span(k)[1]
        for name in caches:
            caches[name] = got[f"{name}.out"]
            close(caches[name][:, :, :end], expected.caches[name][:, :, :end], f"scale {k}: {name}")
            assert np.isnan(caches[name][:, :, end:]).all(), f"scale {k}: {name} written past position {end}"


def test_finish_equals_the_reference(odd, expected):
    got = run(session(odd, "finish"), codes=expected.codes[-1], f_hat=expected.f_hat[-2])
    close(got["f_hat.out"], expected.f_hat[-1], "f_hat")


def test_static_and_symbolic_graphs_agree_for_one_row(odd, expected):
    """A batch of one row, as for one unguided image: no axis is squeezed away."""
    config = odd.var.config
    caches = {n: np.zeros((1, config.num_heads, config.num_tokens, 64), np.float32) for n in cache_names(config.depth)}
    given = {"modulation": expected.modulation[:1], "head_modulation": expected.head_modulation[:1], **caches}
    given |= {"codes": expected.codes[0][:1], "f_hat": expected.f_hat[0][:1]}
    static = run(session(odd, "scale_01"), **given)
    symbolic = run(session(odd, "scales"), **given, start=expected.start[:1], scale=np.array([1]))
    assert static.keys() == symbolic.keys()
    for name in static:
        np.testing.assert_allclose(static[name], symbolic[name], **TOLERANCE, err_msg=name)


def test_another_evaluator_of_the_standard_agrees(odd_states, tmp_path):
    """ONNX's own reference evaluator, which shares no code with ONNX Runtime or PyTorch, runs scale 1."""
    var, vqvae, var_state, vqvae_state = odd_states("shared_aln")
    pair = CheckpointPair(var, vqvae, var_state, vqvae_state)
    path = write_bundle(pair, tmp_path / "bundle") / "scale_01.onnx"
    random = np.random.default_rng(2)
    feeds = {
        tensor.name: random.standard_normal([2 if axis == "R" else axis for axis in tensor.shape]).astype(np.float32)
        for tensor in graph_specs(var, vqvae)["scale_01"].inputs
    }
    evaluator = ReferenceEvaluator(str(path))
    by_onnx = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    by_runtime = run(ort.InferenceSession(path, providers=["CPUExecutionProvider"]), **feeds)
    assert by_onnx.keys() == by_runtime.keys()
    for name in by_onnx:
        np.testing.assert_allclose(by_onnx[name], by_runtime[name], **TOLERANCE, err_msg=name)


# Structure ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """All graphs of a bundle as stored, by name, without their external data."""

    models: dict[str, onnx.ModelProto]

    def nodes(self, op_type: str) -> list[tuple[str, onnx.GraphProto, onnx.NodeProto]]:
        found = [(name, m.graph, node) for name, m in self.models.items() for node in m.graph.node]
        return [entry for entry in found if entry[2].op_type == op_type]


@pytest.fixture(scope="session")
def graphs(odd) -> Graphs:
    specs = odd.bundle.manifest.graphs
    return Graphs({n: onnx.load(odd.bundle.file(s.file), load_external_data=False) for n, s in specs.items()})


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def dimensions(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def is_scale(name: str) -> bool:
    return name.startswith("scale")


def test_opset_and_ir_version_are_those_the_engines_read(graphs):
    for name, model in graphs.models.items():
        assert model.ir_version == 10, name
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)], name
        assert not model.functions, name


def test_only_the_expected_operators_are_used(odd, graphs):
    allowed = {"condition": CONDITION_OPERATORS, "finish": FINISH_OPERATORS, "scales": SYMBOLIC_OPERATORS}
    for name, model in graphs.models.items():
        if name in ("encoder", "decoder"):
            continue  # theirs are in test_vqvae_graphs
        used = {node.op_type for node in model.graph.node}
        assert used <= allowed.get(name, SCALE_OPERATORS), name
        assert not [node for node in model.graph.node if node.domain], name


def test_signature_in_the_file_is_the_declared_one(odd, graphs):
    declared = graph_specs(odd.var.config, odd.vqvae.config)
    assert set(graphs.models) == set(declared)
    for name, spec in declared.items():
        graph = graphs.models[name].graph
        for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
            got = [(v.name, v.type.tensor_type.elem_type, dimensions(v)) for v in values]
            assert got == [(t.name, types[t.dtype], t.shape) for t in tensors], name


def test_every_cache_goes_from_graph_input_to_graph_output_by_one_scatter(odd, graphs):
    names = set(cache_names(odd.var.config.depth))
    per_graph: dict[str, set[str]] = {}
    for name, graph, node in graphs.nodes("TensorScatter"):
        assert attributes(node) == {"axis": 2, "mode": b"linear"}
        cache, output = node.input[0], node.output[0]
        assert len(node.input) == 3
        assert cache in {value.name for value in graph.input}
        assert output == f"{cache}.out"
        assert output in {value.name for value in graph.output}
        per_graph.setdefault(name, set()).add(cache)
        readers = [n for n in graph.node if cache in n.input]
        assert len(readers) == 1, f"{name}: {cache} is read beside its scatter, so it cannot be updated in place"
    assert per_graph == {name: names for name in graphs.models if is_scale(name)}


def test_cache_shapes_are_static_but_for_the_rows(odd, graphs):
    config = odd.var.config
    for name, model in graphs.models.items():
        shapes = [dimensions(v) for v in [*model.graph.input, *model.graph.output] if v.name.startswith("cache_")]
        assert len(shapes) == (4 * config.depth if is_scale(name) else 0)
        assert set(shapes) <= {("R", config.num_heads, config.num_tokens, 64)}


def test_attention_has_three_inputs_one_output_and_no_mask(odd, graphs):
    config = odd.var.config
    scale = 1.0 if config.attn_l2_norm else 0.25 / 8
    found = graphs.nodes("Attention")
    assert len(found) == config.depth * (config.num_scales + 1)
    for name, _, node in found:
        assert len(node.input) == 3, name
        assert all(node.input), name
        assert len(node.output) == 1, name
        assert attributes(node) == {"scale": pytest.approx(scale)}, name  # no heads attribute: the inputs have 4 axes


def test_static_graphs_hold_no_unknown_size_but_the_rows(odd, graphs):
    """After shape inference, every value has sizes known at export or the row axis, and attention sees L_k keys."""
    config = odd.var.config
    for k in range(config.num_scales):
        model = onnx.shape_inference.infer_shapes(graphs.models[scale_graph_name(k)], strict_mode=True)
        shapes = {value.name: dimensions(value) for value in model.graph.value_info}
        shapes |= {value.name: dimensions(value) for value in model.graph.output}
        for node in model.graph.node:
            if node.op_type == "Attention":
                lengths = config.tokens_per_scale[k], config.span(k)[1], config.span(k)[1]
                for value, length in zip(node.input, lengths, strict=True):
                    assert shapes[value][1:] == (config.num_heads, length, 64), f"scale {k}: {value}"
        unknown = {
            axis for node in model.graph.node for v in node.output for axis in shapes[v][1:] if isinstance(axis, str)
        }
        assert not unknown, f"scale {k}: {unknown}"


def test_external_data_stays_inside_the_weights_file(odd, graphs):
    size = odd.bundle.file("weights.safetensors").stat().st_size
    header = 8 + int.from_bytes(odd.bundle.file("weights.safetensors").read_bytes()[:8], "little")
    for name, model in graphs.models.items():
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            begin, length = int(entry["offset"]), int(entry["length"])
            assert entry["location"] == "weights.safetensors"
            assert header <= begin
            assert begin + length <= size
            assert length == 4 * int(np.prod(tensor.dims)), f"{name}: {tensor.name}"


def test_a_weight_has_one_place_in_all_graphs_and_all_weights_are_used(odd, graphs):
    places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for model in graphs.models.values():
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                place = int(entry["offset"]), int(entry["length"]), tuple(tensor.dims)
                assert places.setdefault(tensor.name, place) == place
    covered = np.zeros(odd.bundle.file("weights.safetensors").stat().st_size, dtype=bool)
    for begin, length, _ in places.values():
        covered[begin : begin + length] = True
    header = 8 + int.from_bytes(odd.bundle.file("weights.safetensors").read_bytes()[:8], "little")
    codebook = odd.bundle.weight("quantize.embedding.weight").nbytes  # read by the runtime, not by a graph
    unused = len(covered) - header - int(covered.sum())
    assert unused == codebook


def test_no_weight_is_inline_and_graphs_stay_small(odd, graphs):
    # Inline are index tables and resampling matrices: at most K matrices of h × h in the symbolic graph.
    config = odd.var.config
    largest = 4 * config.num_scales * config.latent_size**2
    for name, model in graphs.models.items():
        inline = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(t.name.startswith("const.") for t in inline), name
        sizes = [len(onnx.numpy_helper.to_array(t).tobytes()) for t in inline]
        assert max(sizes, default=0) <= max(largest, 4 * config.embed_dim), name
        assert len(model.SerializeToString()) < 200_000, name


def test_checker_accepts_every_graph(odd):
    for spec in odd.bundle.manifest.graphs.values():
        onnx.checker.check_model(odd.bundle.file(spec.file), full_check=True)
