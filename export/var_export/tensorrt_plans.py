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
from var_deploy.plans import Batch, Layout, Shape, input_ranges, plan_names
from var_deploy.precision import Precision


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
            profiles: tuple[Profile, ...] = (Profile(shapes=input_ranges(spec, batch)),)
        else:
            pinned = [{"n": n, "n_prev": lengths[max(k - 1, 0)]} for k, n in enumerate(lengths)]
            profiles = tuple(
                Profile(shapes=input_ranges(spec, batch, axes), values={"scale": k}) for k, axes in enumerate(pinned)
            )
        plans.append(Plan(name=name, graph=spec.file, profiles=profiles))
    return plans


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
