"""The bundle on disk: manifest parsing under mutation, seals, and what an altered bundle is told."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import var_deploy
from var_deploy.bundle import MANIFEST, WEIGHTS, Bundle, Manifest
from var_deploy.errors import BundleError
from var_deploy.quantizer import Quantizer
from var_deploy.signature import graph_specs

WHERE = Path("bundle.json")


@pytest.fixture(scope="module")
def valid(tiny_bundle: Path) -> dict[str, Any]:
    """The parsed manifest of a sound bundle; copy it to alter it."""
    return json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))


# ---- parsing ---------------------------------------------------------------------------------------------------------


def test_round_trip_gives_the_same_bytes(tiny_bundle):
    text = (tiny_bundle / MANIFEST).read_text(encoding="utf-8")
    manifest = Manifest.from_json(text, WHERE)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json(), WHERE) == manifest


def test_class_names_of_any_script_survive_the_round_trip(valid):
    names = ["zéro", "одно", "二", '"', "four five", "", "6", "7", "8", "\u2028"]
    manifest = Manifest.from_json(json.dumps({**valid, "class_names": names}), WHERE)
    assert Manifest.from_json(manifest.to_json(), WHERE).class_names == tuple(names)


def test_the_manifest_lists_every_file_with_its_size_and_digest(tiny_bundle, valid):
    assert {file.name for file in tiny_bundle.iterdir()} == {MANIFEST, *valid["files"]}
    for name, seal in valid["files"].items():
        assert seal["size"] == (tiny_bundle / name).stat().st_size


def _altered(data: dict[str, Any], path: str, value: Any) -> str:
    """Manifest text with one value replaced, or deleted with `...`; the path is dotted."""
    data = copy.deepcopy(data)
    *parents, last = path.split("/")
    parent = data
    for key in parents:
        parent = parent[key]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return json.dumps(data)


SEAL = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "zip", "bundle.json: not a bundle manifest: expected \"format\": 'var-deploy bundle'"),
        ("format", ..., "bundle.json: not a bundle manifest"),
        ("format_version", 2, "bundle.json: format version 2, this program reads 1; update var-deploy"),
        ("format_version", 0, "bundle.json: format version 0, this program reads 1; export it again"),
        ("format_version", "1", "bundle.json: format version '1', this program reads 1; export it again"),
        ("precision", "fp7", "precision 'fp7' is unknown, known: fp32, fp16, bf16, int8; update var-deploy"),
        ("precision", "fp8", "precision 'fp8' is unknown, known: fp32, fp16, bf16, int8; update var-deploy"),
        ("precision", ["fp32"], "precision ['fp32'] is unknown, known: fp32, fp16, bf16, int8; update var-deploy"),
        ("precision", ..., "bundle.json: incomplete or malformed (KeyError('precision')); export the bundle again"),
        ("precision", "bf16", "graph signatures differ from what the model needs: ['condition', 'scale_00', 'scale_"),
        ("model", ..., "bundle.json: incomplete or malformed (KeyError('model')); export the bundle again"),
        ("model/var", None, "bundle.json: incomplete or malformed"),
        ("model/var/depth", ..., "bundle.json: VARConfig: missing keys ['depth']"),
        ("model/var/depth", -1, "bundle.json: depth: got -1, expected a positive integer"),
        ("model/var/depth", 10**15, "depth 1000000000000000, but the graphs have"),
        ("model/var/depth", 3, "bundle.json: graph signatures differ from what the model needs: ['condition', 'scale_"),
        ("model/var/heads", 2, "bundle.json: VARConfig: unknown keys ['heads']"),
        ("model/vqvae/vocab_size", 255, "vocab_size is 256 for the VAR, 255 for the VQVAE; export it again"),
        ("model/vqvae/patch_nums", [1, 3, 4], "patch_nums is (1, 2, 3, 4) for the VAR, (1, 3, 4) for the VQVAE"),
        ("sampling/top_k", -1, "bundle.json: top_k: got -1, expected an integer of at least 0"),
        ("sampling/top_p", 1.5, "bundle.json: top_p: got 1.5, expected a number from 0 to 1"),
        ("sampling/guidance", "high", "bundle.json: guidance: got 'high', expected a number from 0 to"),
        ("sampling/guidance", float("nan"), "bundle.json: guidance: got nan, expected a number from 0 to"),
        ("sampling/heat", 1, "bundle.json: incomplete or malformed"),
        ("class_names", ["a", "b"], "bundle.json: 2 class names for 10 classes"),
        ("class_names", [1] * 10, "bundle.json: class names must be texts; export the bundle again"),
        ("license", None, "bundle.json: license must be a text and source an object; export the bundle again"),
        ("source", [1], "bundle.json: license must be a text and source an object; export the bundle again"),
        ("graphs/decoder", ..., "bundle.json: graph signatures differ from what the model needs: ['decoder']"),
        ("graphs/finish/file", "other.onnx", "bundle.json: graph signatures differ from what the model needs: ['fin"),
        ("files/weights.safetensors", ..., "bundle.json: lists no weights.safetensors; export the bundle again"),
        ("files/decoder.onnx", ..., "bundle.json: lists no decoder.onnx; export the bundle again"),
        ("files/decoder.onnx", {"size": "1", "sha256": "0" * 64}, "size: got '1', expected a number of bytes"),
        ("files/decoder.onnx", {"size": 1, "sha256": "x"}, "sha256: got 'x', expected 64 hexadecimal digits"),
    ],
)
def test_a_wrong_value_is_named(valid, path, value, message):
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(_altered(valid, path, value), WHERE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../weights.bin", "/etc/hostname", "a/../../b", "a//b", "./a", "a\\b", "..", "", "C:\\a"]
)
def test_a_file_name_that_is_no_plain_relative_path_is_refused(valid, name):
    data = {**valid, "files": {**valid["files"], name: SEAL}}
    with pytest.raises(BundleError, match="leaves the bundle; expected a plain relative path") as caught:
        Manifest.from_json(json.dumps(data), WHERE)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "{}", '"var-deploy bundle"', "[" * 100_000])
def test_text_that_is_no_manifest(text):
    with pytest.raises(BundleError, match=r"^bundle\.json: not (valid JSON|a bundle manifest)"):
        Manifest.from_json(text, WHERE)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/x", "fp16", "R", "float32", "weights.safetensors", "\x00", "x" * 5000, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _mutate(data: st.DataObject, tree: Any) -> None:
    """One random change anywhere: delete, replace, rename, or copy from elsewhere in the tree."""
    places = list(_places(tree))
    if not places:
        return
    # Depth first, graphs hold nearly all places: choose a branch of the top before choosing a place in it.
    top = data.draw(st.sampled_from(sorted(tree)), label="branch")
    inside = [(tree, top)]
    if isinstance(tree[top], dict | list):
        inside += list(_places(tree[top]))
    container, key = data.draw(st.sampled_from(inside), label="place")
    action = data.draw(st.sampled_from(["delete", "replace", "rename", "copy"]), label="action")
    if action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[data.draw(st.text(max_size=8) | st.sampled_from(["../x", "x" * 5000]))] = container.pop(key)
    elif action == "copy":
        source, source_key = data.draw(st.sampled_from(places), label="source")
        if source_key in source if isinstance(source, dict) else source_key < len(source):
            container[key] = copy.deepcopy(source[source_key])
    else:
        container[key] = data.draw(json_values, label="value")


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_a_mutated_manifest_is_valid_or_a_bundle_error(data, valid):
    tree = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        _mutate(data, tree)
    try:
        manifest = Manifest.from_json(json.dumps(tree), WHERE)
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json(), WHERE) == manifest
    assert dict(manifest.graphs) == graph_specs(manifest.var, manifest.vqvae)


@pytest.fixture(scope="module")
def linked(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose files are those of `tiny_bundle` and whose manifest may be overwritten."""
    directory = tmp_path_factory.mktemp("linked")
    for file in tiny_bundle.iterdir():
        if file.name != MANIFEST:
            (directory / file.name).symlink_to(file)
    return directory


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_a_mutated_bundle_opens_or_is_a_bundle_error(data, valid, linked):
    tree = copy.deepcopy(valid)
    _mutate(data, tree)
    (linked / MANIFEST).write_text(json.dumps(tree), encoding="utf-8")
    try:
        bundle = Bundle.open(linked, verify_digests=False)
        Quantizer(bundle)
    except BundleError:
        return
    assert bundle.manifest.files[WEIGHTS].size == (linked / WEIGHTS).stat().st_size


@given(content=st.binary(max_size=60))
@example(content=b"\xff\xfe{}")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_of_random_bytes_is_a_bundle_error(content, linked):
    (linked / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=re.escape(str(linked / MANIFEST))):
        Bundle.open(linked)


# ---- files -----------------------------------------------------------------------------------------------------------


def _change_byte(bundle: Path) -> None:
    content = bytearray((bundle / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "decoder.onnx").write_bytes(content)


def _truncate_weights(bundle: Path) -> None:
    os.truncate(bundle / WEIGHTS, (bundle / WEIGHTS).stat().st_size - 4)


def _change_seal(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["finish.onnx"]["sha256"] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(data))


def _link_outside(bundle: Path) -> None:
    (bundle / WEIGHTS).rename(bundle.parent / "elsewhere")
    (bundle / WEIGHTS).symlink_to("../elsewhere")


def _directory_for_a_file(bundle: Path) -> None:
    (bundle / "encoder.onnx").unlink()
    (bundle / "encoder.onnx").mkdir()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (_change_byte, r"decoder\.onnx has sha256 [0-9a-f]{12}…, expected [0-9a-f]{12}…"),
        (_change_seal, r"finish\.onnx has sha256 [0-9a-f]{12}…, expected 000000000000…"),
        (_truncate_weights, r"weights\.safetensors has \d+ bytes, expected \d+"),
        (_link_outside, r"weights\.safetensors is a link that leaves the bundle"),
        (_directory_for_a_file, r"encoder\.onnx is missing"),
        (lambda bundle: (bundle / "scale_02.onnx").unlink(), r"scale_02\.onnx is missing"),
    ],
)
def test_an_altered_bundle_is_refused_and_the_file_named(tiny_copy: Path, alter: Callable[[Path], None], message: str):
    alter(tiny_copy)
    expected = rf"^{re.escape(str(tiny_copy))}: changed since export: {message}; copy or export it again$"
    with pytest.raises(BundleError, match=expected):
        var_deploy.load(tiny_copy)


def test_all_that_is_wrong_is_said_at_once(tiny_copy):
    _change_byte(tiny_copy)
    _truncate_weights(tiny_copy)
    (tiny_copy / "finish.onnx").unlink()
    with pytest.raises(BundleError) as caught:
        Bundle.open(tiny_copy)
    for name in ("decoder.onnx", WEIGHTS, "finish.onnx"):
        assert name in str(caught.value)


def test_a_link_inside_the_bundle_is_fine(tiny_copy):
    (tiny_copy / WEIGHTS).rename(tiny_copy / "data.bin")
    (tiny_copy / WEIGHTS).symlink_to("data.bin")
    assert Bundle.open(tiny_copy).weight("head.bias").shape == (256,)


def test_a_bundle_may_be_reached_through_a_link_and_moved(tiny_bundle, tmp_path):
    (tmp_path / "link").symlink_to(tiny_bundle)
    assert Bundle.open(tmp_path / "link").manifest == Bundle.open(tiny_bundle).manifest


def test_skipping_digests_still_compares_sizes(tiny_copy):
    _change_byte(tiny_copy)
    Bundle.open(tiny_copy, verify_digests=False)
    _truncate_weights(tiny_copy)
    with pytest.raises(BundleError, match="weights"):
        Bundle.open(tiny_copy, verify_digests=False)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch], ids=["nothing", "empty", "file"])
def test_a_path_without_a_bundle(tmp_path, make):
    path = tmp_path / "there"
    make(path)
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert str(caught.value) == f"{path}: no bundle here: expected a directory with bundle.json; make one with export"


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"\xff" * 200], ids=["empty", "zeros", "ones"])
def test_resealed_weights_that_are_no_safetensors_file(tiny_copy, reseal, content):
    (tiny_copy / WEIGHTS).write_bytes(content)
    reseal(tiny_copy, WEIGHTS)
    with pytest.raises(var_deploy.VarDeployError, match="weights"):
        var_deploy.load(tiny_copy)


def test_resealed_truncated_weights_do_not_load(tiny_copy, reseal):
    os.truncate(tiny_copy / WEIGHTS, (tiny_copy / WEIGHTS).stat().st_size // 2)
    reseal(tiny_copy, WEIGHTS)
    with pytest.raises(var_deploy.VarDeployError, match=r"\.(safetensors|onnx): "):
        var_deploy.load(tiny_copy)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_a_safetensors_file_that_the_library_reads(tiny_bundle):
    weights = load_file(tiny_bundle / WEIGHTS)
    bundle = Bundle.open(tiny_bundle)
    assert {str(value.dtype) for value in weights.values()} == {"float32"}
    for name in ("head.weight", "quantize.phi.bias", "decoder.conv_out.weight"):
        np.testing.assert_array_equal(bundle.weight(name), weights[name])


def test_an_unknown_weight_is_named(tiny_bundle):
    with pytest.raises(BundleError, match=r"weights\.safetensors: .*nonsense.*; export the bundle again"):
        Bundle.open(tiny_bundle).weight("nonsense")
