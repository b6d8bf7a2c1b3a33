"""weights.safetensors is streamed by hand, so its bytes are held to the safetensors library and to its layout."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open

from var_deploy.errors import BundleError
from var_export.deploy_view import LazyWeight, deploy_weights
from var_export.weights_file import ALIGNMENT, PAGE, read_layout, weights_layout, write_weights

#: Sizes around the alignment, in an order that is not the file's.
SHAPES = {"odd": (3, 5), "even": (4, 16), "one": (1,), "row": (1, 7, 1), "wide": (2, 1024), "sixteen": (16,), "ä": (2,)}


def lazy(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyWeight]:
    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))

    return {name: LazyWeight(shape, partial(make, name, shape)) for name, shape in shapes.items()}


def test_library_reads_back_every_value(tmp_path):
    weights = lazy(SHAPES)
    write_weights(tmp_path / "w.safetensors", weights, weights_layout(weights))
    with safe_open(tmp_path / "w.safetensors", framework="np") as file:
        assert set(file.keys()) == set(weights)
        for name, weight in weights.items():
            np.testing.assert_array_equal(file.get_tensor(name), weight.numpy())


def test_slots_say_where_the_bytes_lie(tmp_path):
    weights = lazy(SHAPES)
    layout = weights_layout(weights)
    write_weights(tmp_path / "w", weights, layout)
    content = (tmp_path / "w").read_bytes()
    assert len(content) == layout.size
    end = len(layout.header)
    for name, slot in layout.slots.items():
        assert slot.offset == end, f"{name}: a gap or overlap"
        assert content[slot.offset : slot.offset + slot.length] == weights[name].numpy().tobytes()
        assert slot.shape == weights[name].shape
        end += slot.length
    assert end == len(content)


def test_a_layout_is_read_back(tmp_path):
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "byte": torch.int8}
    others = {
        name: LazyWeight((3, 8), partial(torch.ones, 3, 8, dtype=dtype), str(dtype).removeprefix("torch."))
        for name, dtype in dtypes.items()
    }
    weights = lazy(SHAPES) | others
    layout = weights_layout(weights)
    write_weights(tmp_path / "w", weights, layout)
    assert read_layout(tmp_path / "w") == layout


@pytest.mark.parametrize(
    "content",
    [b"", b"\x04", b"\x04\0\0\0\0\0\0\0nope", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0[]", None]
    + [len(text).to_bytes(8, "little") + text for text in (b'{"a": 3}', b'{"a": {"dtype": "F8", "shape": [], '
                                                          b'"data_offsets": [0, 1]}}')],
)  # fmt: skip
def test_a_header_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(BundleError, match=r"w: its header cannot be read \(.*\); export the bundle again"):
        read_layout(tmp_path / "w")


def test_digest_and_progress_are_of_the_bytes_written(tmp_path):
    weights, heard = lazy(SHAPES), []
    layout = weights_layout(weights)
    digest = write_weights(tmp_path / "w", weights, layout, heard.append)
    assert digest == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    assert heard == [slot.length for slot in layout.slots.values()]


def test_data_starts_on_a_page_and_large_tensors_are_aligned(odd):
    layout = weights_layout(deploy_weights(odd.pair))
    assert len(layout.header) % PAGE == 0
    assert min(slot.offset for slot in layout.slots.values()) == len(layout.header)
    for name, slot in layout.slots.items():
        if slot.length % ALIGNMENT == 0:
            assert slot.offset % ALIGNMENT == 0, name
        assert slot.offset % 4 == 0, name


def test_tensors_of_any_type_are_aligned_to_their_elements_and_read_back(tmp_path):
    dtypes = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    weights = {
        f"{dtype}.{size}": LazyWeight((size,), partial(torch.arange, size, dtype=kind), dtype)
        for size in (3, 64, 7)
        for dtype, kind in dtypes.items()
    }
    layout = weights_layout(weights)
    write_weights(tmp_path / "w", weights, layout)
    for name, slot in layout.slots.items():
        assert slot.offset % (ALIGNMENT if name.endswith("64") else weights[name].itemsize) == 0, name
    with safe_open(tmp_path / "w", framework="pt") as file:
        for name, weight in weights.items():
            expected = weight.make()
            assert file.get_tensor(name).dtype == expected.dtype
            assert torch.equal(file.get_tensor(name), expected), name
            assert layout.slots[name].dtype == weight.dtype
            assert layout.slots[name].length == weight.nbytes == expected.nbytes


@pytest.mark.parametrize("count", [1, 30, 200])
def test_header_of_any_length_is_padded_to_whole_pages(count):
    layout = weights_layout(lazy({f"a.rather.long.name.of.a.weight.{i}": (16, i + 1) for i in range(count)}))
    assert len(layout.header) % PAGE == 0
    length = int.from_bytes(layout.header[:8], "little")
    assert length == len(layout.header) - 8
    assert len(json.loads(layout.header[8:])) == count


def test_same_weights_give_the_same_layout_and_order_is_stable():
    first, second = weights_layout(lazy(SHAPES)), weights_layout(lazy(SHAPES))
    assert first == second
    assert list(first.slots) == ["even", "wide", "sixteen", "odd", "one", "row", "ä"]  # aligned ones first


def test_exported_file_holds_the_deploy_view(odd):
    weights = deploy_weights(odd.pair)
    with safe_open(odd.bundle.file("weights.safetensors"), framework="np") as file:
        assert set(file.keys()) == set(weights)
        for name, weight in weights.items():
            np.testing.assert_array_equal(file.get_tensor(name), weight.numpy(), err_msg=name)


def test_existing_file_is_not_overwritten(tmp_path):
    weights = lazy(SHAPES)
    (tmp_path / "w").write_text("mine")
    with pytest.raises(FileExistsError):
        write_weights(tmp_path / "w", weights, weights_layout(weights))
    assert (tmp_path / "w").read_text() == "mine"


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """The next tensor is made only after the one before it was written."""
    events: list[str] = []

    def make(name: str) -> torch.Tensor:
        events.append(f"make {name}")
        return torch.zeros(16)

    weights = {name: LazyWeight((16,), partial(make, name)) for name in "abc"}
    write_weights(tmp_path / "w", weights, weights_layout(weights), lambda _: events.append("written"))
    assert events == ["make a", "written", "make b", "written", "make c", "written"]
