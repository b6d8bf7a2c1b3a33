"""Which TensorRT plans a bundle needs, as data: graphs, optimization profiles, memory. No TensorRT, no GPU.

Two layouts. "per-scale": a plan for every static graph, each with its own copy of the weights in GPU memory, as
TensorRT shares none between engines. "profiles": one plan of the symbolic graph with a profile per scale, pinned to
that scale's lengths, over one copy of the weights. Rows of the transformer run from one unguided image to the largest
guided batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from var_deploy.bundle import Bundle
from var_deploy.errors import BundleError
from var_deploy.plans import Batch, Layout, plan_names
from var_deploy.precision import Precision
from var_deploy.signature import GraphSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Least, tuned and largest shape of every input, and values of inputs that lengths are computed from."""

    shapes: dict[str, tuple[Shape, Shape, Shape]]
    values: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One plan to build."""

    name: str
    graph: str  #: file in the bundle
    profiles: tuple[Profile, ...]


def plans_of(bundle: Bundle, batch: Batch, layout: Layout) -> list[Plan]:
    """All plans that `generate` and `encode` need. Raises BundleError for a bundle that TensorRT cannot run."""
    manifest = bundle.manifest
    if manifest.precision is Precision.INT8:
        raise BundleError(
            f"{bundle.path}: an int8 bundle has operators of ONNX Runtime alone; export fp16, bf16 or fp32 for TensorRT"
        )
    plans = []
    for name in plan_names(manifest.var.num_scales, layout):
        spec, lengths = manifest.graphs[name], manifest.var.tokens_per_scale
        if name != "scales":
            profiles: tuple[Profile, ...] = (_profile(spec, batch, {}, {}),)
        else:
            pinned = [{"n": n, "n_prev": lengths[max(k - 1, 0)]} for k, n in enumerate(lengths)]
            profiles = tuple(_profile(spec, batch, axes, {"scale": k}) for k, axes in enumerate(pinned))
        plans.append(Plan(name=name, graph=spec.file, profiles=profiles))
    return plans


def _profile(spec: GraphSpec, batch: Batch, pinned: dict[str, int], values: dict[str, int]) -> Profile:
    """pinned: symbolic axes that this profile fixes."""
    open_axes = {
        "R": (batch.least, 2 * batch.tuned, 2 * batch.most),
        "B": (batch.least, batch.tuned, batch.most),
        **{name: (length,) * 3 for name, length in pinned.items()},
    }

    def shape(axes: tuple[int | str, ...], which: int) -> Shape:
        return tuple(axis if isinstance(axis, int) else open_axes[axis][which] for axis in axes)

    shapes = {
        tensor.name: (shape(tensor.shape, 0), shape(tensor.shape, 1), shape(tensor.shape, 2)) for tensor in spec.inputs
    }
    return Profile(shapes=shapes, values=values)


def weight_copies(layout: Layout, num_scales: int) -> int:
    """How often the transformer's weights lie in GPU memory."""
    return num_scales if layout is Layout.PER_SCALE else 1


def memory_needed(bundle: Bundle, batch: Batch, layout: Layout) -> int:
    """Bytes on the GPU that are there for certain when all plans are loaded: weights and caches.

    Activations and scratch memory come on top; only TensorRT knows them, once it has built.
    """
    manifest = bundle.manifest
    once = ("decoder.", "encoder.", "quant_conv.", "post_quant_conv.", "quantize.", "class_emb.")
    sizes = bundle.weight_bytes()
    # AdaLN projections and the embedding of classes are read by `condition` alone.
    transformer = sum(size for name, size in sizes.items() if not name.startswith(once) and "ada_" not in name)
    rest = sum(sizes.values()) - transformer
    var, cache_bytes = manifest.var, 4 if manifest.precision is Precision.FP32 else 2
    caches = cache_bytes * 2 * var.depth * 2 * batch.most * var.num_tokens * var.embed_dim
    return weight_copies(layout, var.num_scales) * transformer + rest + caches


def trtexec_lines(bundle: Bundle, batch: Batch, layout: Layout) -> list[str]:
    """Such builds by NVIDIA's own tool, for a first look, run in the bundle's directory.

    Its plans are not sealed, so no engine takes them.
    """
    lines = ["mkdir -p trtexec"]
    for plan in plans_of(bundle, batch, layout):
        words = [f"trtexec --onnx={plan.graph} --saveEngine=trtexec/{plan.name}.plan --stripWeights --noTF32"]
        words += ["--timingCacheFile=trtexec/timing.cache", "--skipInference"]
        for profile_index, profile in enumerate(plan.profiles):
            if len(plan.profiles) > 1:
                words.append(f"--profile={profile_index}")
            shapes = profile.shapes | {name: ((value,),) * 3 for name, value in profile.values.items()}
            for which, option in enumerate(("minShapes", "optShapes", "maxShapes")):
                given = ",".join(f"{name}:{'x'.join(map(str, shape[which]))}" for name, shape in shapes.items())
                words.append(f"--{option}={given}")
        lines.append(" ".join(words))
    return lines
