"""A bundle → milliseconds of one image by ONNX operator, in the transformer and in the decoder's graph.

ONNX Runtime's profiler writes a file per session; the last of two images is counted. The sessions are those that the
engine runs, except that the decoder is always the graph: minimal filtering has no operators.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines.engine import Decoder, Graphs
from ..errors import EngineError
from ..pipeline import Pipeline

#: Part → the graphs that it is made of.
PARTS = {"transformer": ("condition", "scales"), "decoder": ("decoder",)}

IMAGES = 2  # the first one warms up


def operator_milliseconds(bundle: Path, threads: int, guidance: float | None = None) -> dict[str, dict[str, float]]:
    """Milliseconds by part and operator, the longest first. Raises BundleError and EngineError."""
    with tempfile.TemporaryDirectory() as directory:
        generate = _profiled(bundle, threads, guidance, Path(directory))
        for _ in range(IMAGES):
            generate()
        del generate
        gc.collect()  # a session that ends writes its file
        return {part: _added_up([Path(directory) / graph for graph in graphs]) for part, graphs in PARTS.items()}


def _profiled(path: Path, threads: int, guidance: float | None, directory: Path) -> Callable[[], Any]:
    """Makes one image; the sessions live as long as this."""
    from ..engines.onnx import OnnxEngine

    bundle = Bundle.open(path)
    engine = OnnxEngine(bundle, graphs=Graphs.SYMBOLIC, decoder=Decoder.GRAPH, threads=threads, profile=directory)
    pipe = Pipeline(bundle, engine)
    return lambda: pipe.generate(0, guidance=guidance)


def _added_up(prefixes: list[Path]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for prefix in prefixes:
        files = sorted(prefix.parent.glob(f"{prefix.name}_*.json"))
        if not files:
            raise EngineError(f"the profiler left no file for graph {prefix.name!r}; leave the profile out")
        found += operators_of(json.loads(files[-1].read_text(encoding="utf-8")))
    return dict(found.most_common())


def operators_of(events: list[dict[str, Any]]) -> Counter[str]:
    """Milliseconds by operator in the last image of a session's events, which are in microseconds."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    begin = runs[len(runs) - len(runs) // IMAGES]
    found: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin:
            found[event["args"]["op_name"]] += event["dur"] / 1e3
    return found
