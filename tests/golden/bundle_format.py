"""The bundle format, pinned: all that a bundle of the tiny golden model says about itself but for digests and versions.

A change here breaks bundles that people have: raise FORMAT_VERSION, then `python tests/golden/bundle_format.py BUNDLE`
writes `bundle_format.json` anew from a bundle of the tiny golden model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx

PINNED = Path(__file__).with_suffix(".json")


def described_format(bundle: Path) -> dict[str, Any]:
    """The manifest without what may differ between machines, the layout of the weights, each graph's weights."""
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["source"] = {
        key: sorted(value) if isinstance(value, dict) else "…" for key, value in manifest["source"].items()
    }
    manifest["files"] = {name: sorted(seal) for name, seal in manifest["files"].items()}
    content = (bundle / "weights.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[:end]
    graphs = {}
    for graph in manifest["graphs"].values():
        stored = onnx.load(bundle / graph["file"], load_external_data=False).graph.initializer
        graphs[graph["file"]] = sorted(t.name for t in stored if t.data_location == onnx.TensorProto.EXTERNAL)
    return {
        "manifest": manifest,
        "weights": {"size": len(content), "header_sha256": hashlib.sha256(header).hexdigest()},
        "tensors": {name: [e["dtype"], e["shape"], e["data_offsets"]] for name, e in json.loads(header[8:]).items()},
        "graph_weights": graphs,
    }


def format_text(bundle: Path) -> str:
    """Canonical text of `described_format`, one entry a line; the order of keys counts."""
    sections = []
    for section, entries in described_format(bundle).items():
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        sections.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    PINNED.write_text(format_text(Path(sys.argv[1])), encoding="utf-8")
