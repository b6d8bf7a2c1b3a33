"""The counted launches against what the torch engine really calls, stage by stage, and the memory plan of `inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from var_deploy.bundle import Bundle
from var_deploy.engines.engine import LoopForm
from var_deploy.engines.torch.engine import TorchEngine
from var_deploy.inspection import inspect_bundle
from var_deploy.launch_counts import launch_counts
from var_deploy.precision import Precision
from var_deploy.sampling import Settings
from var_kernels import Ops, reference_ops
from var_kernels.ops import OPERATIONS

#: Calls that only look at memory in another way, and those that only reserve it.
NO_LAUNCH = {
    *(
        "alias",
        "chunk",
        "empty",
        "empty_like",
        "expand",
        "flatten",
        "new_empty",
        "permute",
        "reshape",
        "select",
        "slice",
    ),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
}


class Calls(TorchDispatchMode):
    """Counts library calls that launch something, and calls of our operations, but not what happens inside those."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._inside = False
        self._ignored = set(NO_LAUNCH)
        if precision is not Precision.FP8:
            self._ignored.add("gelu")  # a call of its own on a CPU only; on a GPU it rides in the product
        if precision is Precision.FP32:
            self._ignored.add("to")  # the cast before the decoder, to the type that f_hat has

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if not self._inside and name not in self._ignored:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def counted(self, name, operation):
        def call(*args, **kwargs):
            self.counts[name] += 2 if name == "groupnorm_silu" else 1  # sum and statistics, then the rest
            self._inside = True
            try:
                return operation(*args, **kwargs)
            finally:
                self._inside = False

        return call


@pytest.mark.parametrize(
    ("name", "precision", "smooth"),
    [*(("tiny", precision, False) for precision in Precision), ("shared_aln", Precision.FP32, True)],
)
def test_every_stage_launches_what_is_counted(name, precision, smooth, request):
    bundle = Bundle.open(request.getfixturevalue(f"{name}_bundle"))
    calls = Calls(precision)
    counted = {op: calls.counted(op, getattr(reference_ops(), op)) for op in OPERATIONS}
    engine = TorchEngine(bundle, torch.device("cpu"), precision=precision, ops=Ops(name="counted", **counted))
    var, vqvae = bundle.manifest.var, bundle.manifest.vqvae
    settings = Settings.constant((1.0,) * var.num_scales, top_k=0, top_p=0.0, smooth=smooth)
    launches: Counter[str] = Counter()
    with engine._running():
        _, stages = engine._slots.ready(1, LoopForm.of(settings, staged=True))
        for stage in stages:
            calls.counts.clear()
            with calls:
                stage.launch()
            launches[stage.name.split("_")[0]] += calls.counts.total()
    assert dict(launches) == launch_counts(var, vqvae, precision, smooth=smooth)


def test_slices_multiply_the_decoder(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    one, three = (
        launch_counts(manifest.var, manifest.vqvae, Precision.BF16, decode_slices=slices) for slices in (1, 3)
    )
    assert three["decode"] == 3 * one["decode"]
    assert three["scale"] == one["scale"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("tiny", Precision.FP32), ("tiny", Precision.INT8), ("shared_aln", Precision.BF16), ("shared_aln", Precision.FP8)],
)
def test_planned_weights_are_those_that_the_engine_holds(name, precision, request):
    path: Path = request.getfixturevalue(f"{name}_bundle")
    planned = inspect_bundle(path, [1], precision)["torch"]["memory"][0]["weights"]
    engine = TorchEngine(Bundle.open(path), torch.device("cpu"), precision=precision, ops=reference_ops())
    held, seen = 0, set()
    pending: list[object] = [engine._program.transformer, engine._program._decode_map.__self__]
    while pending:
        thing = pending.pop()
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        elif isinstance(thing, dict):
            pending += thing.values()
        elif isinstance(thing, list | tuple):
            pending += thing
        elif type(thing).__module__.startswith("var_deploy.engines.torch"):
            pending += [getattr(thing, slot) for slot in getattr(thing, "__slots__", ())]
            pending += vars(thing).values() if hasattr(thing, "__dict__") else []
    # Small tables that are made from weights (resampling, a φ per scale) come on top; of these small models they are
    # a larger part than of any published one.
    assert planned <= held <= 1.15 * planned
