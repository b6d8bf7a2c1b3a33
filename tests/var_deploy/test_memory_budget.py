"""What fits is run at once and what does not in parts; sizes as users write them; what is said where nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from var_deploy import memory_budget
from var_deploy.bundle import Bundle
from var_deploy.cgroups import MemoryGroup
from var_deploy.engines.engine import Decoder
from var_deploy.errors import EngineError
from var_deploy.memory import MemoryPlan
from var_deploy.memory_budget import MemoryBudget, available_memory, bytes_from_text, onnx_plan

MB = 10**6


def _plan(batch: int, guided: bool) -> MemoryPlan:
    """100 MB of weights, 50 of process, 10 per row."""
    rows = batch * (2 if guided else 1)
    return MemoryPlan(
        batch=batch,
        rows=rows,
        weights=100 * MB,
        caches=7 * rows * MB,
        logits=2 * rows * MB,
        activations=rows * MB,
        process=50 * MB,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`free(bytes)`: a machine with that much left."""
    return lambda size: monkeypatch.setattr(memory_budget, "available_memory", lambda: size)


@pytest.mark.parametrize(
    ("available", "limit", "held", "guided", "chunks"),
    [
        (1000 * MB, None, 0, True, [10]),
        (None, None, 0, True, [10]),  # a system that does not tell
        (300 * MB, None, 0, True, [5, 5]),  # 285 MB are 6 guided images
        (300 * MB, None, 0, False, [10]),
        (200 * MB, None, 0, True, [2, 2, 2, 2, 2]),
        (200 * MB, None, 60 * MB, True, [5, 5]),  # what is held already need not be found
        (None, 210 * MB, 0, True, [2, 3, 2, 3]),
        (1000 * MB, 210 * MB, 500 * MB, True, [2, 3, 2, 3]),
        (200 * MB, 900 * MB, 0, True, [2, 2, 2, 2, 2]),
        (None, 170 * MB, 0, True, [1] * 10),
    ],
)
def test_a_batch_runs_in_equal_parts_that_fit(free, available, limit, held, guided, chunks):
    free(available)
    budget = MemoryBudget(plan=_plan, limit=limit, held=held)
    assert budget.chunks(10, guided) == chunks
    assert budget.images_at_once(10, guided) >= max(chunks)


@settings(max_examples=50)
@given(batch=st.integers(1, 200), room=st.integers(170, 3000))
def test_parts_hold_every_image_once_and_fit(batch, room):
    budget = MemoryBudget(plan=_plan, limit=room * MB)
    chunks = budget.chunks(batch, True)
    assert sum(chunks) == batch
    assert max(chunks) - min(chunks) <= 1
    assert all(_plan(size, True).total <= room * MB for size in chunks)
    fewer = len(chunks) - 1
    assert fewer == 0 or _plan(-(-batch // fewer), True).total > room * MB  # no part too many


@pytest.mark.parametrize(
    ("available", "limit", "guided", "message"),
    [
        (
            100 * MB,
            None,
            True,
            "one image needs 170 MB (100 MB of weights, 20 MB while it runs), 95 MB can be had here; free memory, "
            "set guidance=0, which takes half the rows, or use a smaller or an int8 bundle",
        ),
        (
            1000 * MB,
            159 * MB,
            False,
            "one image needs 160 MB (100 MB of weights, 10 MB while it runs), 159 MB are allowed by memory_limit; "
            "raise memory_limit, or use a smaller or an int8 bundle",
        ),
    ],
)
def test_where_not_one_image_fits_one_line_says_what_to_do(free, available, limit, guided, message):
    free(available)
    budget = MemoryBudget(plan=_plan, limit=limit)
    assert budget.images_at_once(3, guided) == 0
    with pytest.raises(EngineError) as caught:
        budget.chunks(3, guided)
    assert str(caught.value) == message


def test_a_split_is_logged_once_per_shape(free, caplog):
    free(300 * MB)
    budget = MemoryBudget(plan=_plan)
    with caplog.at_level("INFO", logger="var_deploy"):
        for batch in (10, 10, 6, 13, 10, 13):
            budget.chunks(batch, True)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"a batch of {batch} needs {size} MB, 285 MB can be had here: "
        f"it runs in {parts} parts of at most 5 images, one after the other"
        for batch, size, parts in ((10, 350, 2), (13, 410, 3))
    ]


# ---- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meminfo", "group", "expected"),
    [
        ("MemFree: 5 kB\nMemAvailable:    2000 kB\n", None, 2_048_000),
        ("MemAvailable:    2000 kB\n", MemoryGroup(limit=9000, used=8000), 1000),
        ("MemAvailable:    2000 kB\n", MemoryGroup(limit=10**9, used=0), 2_048_000),
        ("MemFree: 5 kB\n", MemoryGroup(limit=9000, used=9500), 0),
        ("MemFree: 5 kB\n", None, None),
        (None, None, None),
    ],
)
def test_the_least_of_machine_and_group_is_available(tmp_path, monkeypatch, meminfo, group, expected):
    monkeypatch.setattr(memory_budget, "memory_group", lambda: group)
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    assert available_memory(tmp_path / "meminfo") == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4000", 4_000_000_000),
        ("3.5G", 3_500_000_000),
        ("500MB", 500_000_000),
        (" 2 GiB ", 2 * 2**30),
        ("0.5Ti", 2**39),
        ("64KiB", 65536),
    ],
)
def test_sizes(text, size):
    assert bytes_from_text(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "4 g", "1e9", "GB", "4GBs", "four", "٣", "1e-9", "nan", "9" * 400])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(EngineError) as caught:
        bytes_from_text(text)
    expected = "expected megabytes or a size with its unit: 4000, 4GB, 3.5GiB"
    assert str(caught.value) == f"memory limit: got {text!r}, {expected}"


# ---- the plan of a bundle --------------------------------------------------------------------------------------------


def test_the_winograd_decoder_holds_four_times_its_transformed_weights(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle, verify_digests=False)
    graph, winograd = (onnx_plan(bundle, decoder, 2)(1, True) for decoder in (Decoder.GRAPH, Decoder.WINOGRAD))
    sizes, vqvae = bundle.weight_bytes(), bundle.manifest.vqvae
    deepest = len(vqvae.ch_mult) - 1
    blocks = [f"up.{level}.block.{j}" for level in range(deepest) for j in range(vqvae.num_res_blocks + 1)]
    names = [f"{block}.conv{i}" for block in blocks for i in (1, 2)]
    names += [f"up.{level}.upsample.conv" for level in range(1, deepest + 1)] + ["conv_out"]
    transformed = sum(sizes[f"decoder.{name}.weight"] for name in names)
    assert winograd.weights - graph.weights == 3 * transformed  # 36 planes of 9 taps
    # Loaded are all weights but the encoder's.
    encoder = sum(size for name, size in sizes.items() if name.startswith(("encoder.", "quant_conv.")))
    assert graph.weights == sum(sizes.values()) - encoder
    assert winograd.process > graph.process  # the compiler
