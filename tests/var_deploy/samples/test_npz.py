"""The .npz: what NumPy and guided-diffusion's way of reading find in it, and when there is none."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import RequestError
from var_deploy.evaluation.samples import open_images
from var_deploy.samples.folder import SampleFolder
from var_deploy.samples.npz import write_npz


def test_numpy_reads_images_and_classes_in_order(plan, undisturbed):
    with np.load(undisturbed / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        images_NHW3, labels_N = archive["arr_0"], archive["arr_1"]
    assert (images_NHW3.dtype, images_NHW3.shape) == (np.uint8, (31, 64, 64, 3))
    assert labels_N.dtype == np.int64
    np.testing.assert_array_equal(labels_N, plan.labels(range(31)))
    for index in (0, 17, 30):
        with Image.open(undisturbed / f"{index:06d}.png") as image:
            np.testing.assert_array_equal(images_NHW3[index], np.asarray(image))


def test_images_can_be_read_from_the_file_one_after_the_other(undisturbed):
    """As the public evaluator does: it knows headers 1.0 and 2.0, and reads on behind them without unpacking."""
    with zipfile.ZipFile(undisturbed / "samples.npz") as archive:
        assert [member.compress_type for member in archive.infolist()] == [zipfile.ZIP_STORED] * 2
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((31, 64, 64, 3), False, np.dtype(np.uint8))
            assert len(file.read()) == 31 * 64 * 64 * 3


def test_our_own_evaluation_takes_folder_and_npz_as_the_same_images(plan, undisturbed):
    folder, archive = open_images(undisturbed), open_images(undisturbed / "samples.npz")
    for images in (folder, archive):
        np.testing.assert_array_equal(images.labels(), plan.labels(range(31)))
    np.testing.assert_array_equal(np.concatenate(list(folder.batches(9))), np.concatenate(list(archive.batches(9))))


def test_members_say_their_sizes_in_64_bits(undisturbed):
    """50,000 images of 256 px are more than the 4 GB of a plain zip file; whether it is one is decided at the start."""
    with zipfile.ZipFile(undisturbed / "samples.npz") as archive:
        offset = archive.getinfo("arr_0.npy").header_offset
    header = (undisturbed / "samples.npz").read_bytes()[offset : offset + 200]
    assert int.from_bytes(header[18:22], "little") == 0xFFFFFFFF  # the size is in the extra field


def _remove(out: Path) -> None:
    for index in (3, 30):
        (out / f"{index:06d}.png").unlink()


def _other_size(out: Path) -> None:
    Image.new("RGB", (32, 64)).save(out / "000002.png")


def _damage(out: Path) -> None:
    data = (out / "000002.png").read_bytes()
    (out / "000002.png").write_bytes(data[:2000] + bytes(500) + data[2500:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove, "out: 2 of 31 samples are missing, so no samples.npz; sample them first"),
        (_other_size, "000002.png: not the sample that was written (32×64 RGB, not 64×64 RGB); remove it, then"),
        (_damage, "000002.png: not the sample that was written ("),
    ],
    ids=["missing", "another size", "damaged"],
)
def test_samples_that_are_not_whole_give_none(plan, undisturbed, tmp_path, spoil, message):
    out = Path(shutil.copytree(undisturbed, tmp_path / "out", ignore=shutil.ignore_patterns("*.npz")))
    spoil(out)
    with pytest.raises(RequestError) as caught:
        write_npz(SampleFolder(path=out, plan=plan))
    assert message in str(caught.value)
    assert [path.name for path in out.iterdir() if "npz" in path.name and "lock" not in path.name] == []
