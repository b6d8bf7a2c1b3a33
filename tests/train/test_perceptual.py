"""The perceptual distance against the formula written out, with random weights; files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError
from var_train.perceptual import DEVIATION, GROUPS, MEAN, PerceptualDistance, load_perceptual

#: Numbers of VGG-16's convolutions in torchvision's list.
CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    random, before, state = torch.Generator().manual_seed(0), 3, {}
    widths = [width for group in GROUPS for width in group]
    for number, width in zip(CONVS, widths, strict=True):
        scale = (2 / (9 * before)) ** 0.5
        state[f"features.{number}.weight"] = scale * torch.randn(width, before, 3, 3, generator=random)
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=random)
        before = width
    for i, group in enumerate(GROUPS):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, group[-1], 1, 1, generator=random)
    return state


def images(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_distance_is_the_formula_written_out(state):
    ours, theirs = images(1), images(2)

    def features(image: torch.Tensor) -> list[torch.Tensor]:
        x, found = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1), []
        for number in range(30):  # torchvision's list: convolutions, ReLUs, poolings at 4, 9, 16 and 23
            if number in CONVS:
                x = F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1)
            elif number in (4, 9, 16, 23):
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(x)
            if number in (3, 8, 15, 22, 29):
                found.append(x)
        return found

    expected = 0.0
    for i, (a, b) in enumerate(zip(features(ours), features(theirs), strict=True)):
        a, b = (x / x.square().sum(1, keepdim=True).sqrt() for x in (a, b))
        expected += ((a - b).square() * state[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2)).mean().item()
    assert PerceptualDistance(state)(ours, theirs).item() == pytest.approx(expected, rel=1e-4)


def test_equal_images_have_no_distance_and_weights_are_not_trained(state):
    distance = PerceptualDistance(state)
    image = images(3).requires_grad_(True)
    assert distance(image, image.detach()).item() == 0
    distance(image, images(4)).backward()
    assert image.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_without_weights_of_its_own_every_channel_counts_alike(state):
    plain = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    ones = {**plain, **{f"lin{i}.model.1.weight": torch.ones(1, g[-1], 1, 1) for i, g in enumerate(GROUPS)}}
    assert PerceptualDistance(plain)(images(1), images(2)) == PerceptualDistance(ones)(images(1), images(2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_read_whichever_way_it_was_saved(state, tmp_path, suffix):
    path = tmp_path / f"vgg{suffix}"
    more = {**state, "classifier.0.weight": torch.zeros(2, 2)}  # torchvision's file has these too
    save_file(more, path) if suffix == ".safetensors" else torch.save(more, path)
    assert load_perceptual(path)(images(1), images(2)) == PerceptualDistance(state)(images(1), images(2))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_file_that_is_something_else_is_one_line_and_nothing_of_it_is_executed(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Payload()}, "code.pth")
    torch.save([1], "list.pth")
    torch.save({**state, "features.28.bias": torch.zeros(7)}, "shape.pth")
    Path("short.pth").write_bytes(b"PK")
    Path("short.safetensors").write_bytes(b"12345678")
    messages = {
        "code.pth": "cannot be read (UnpicklingError",
        "list.pth": "got a list, expected a state dict",
        "shape.pth": "features.28.bias: got (7,), expected (512,)",
        "short.pth": "cannot be read (",
        "short.safetensors": "cannot be read (",
        "none.pth": "cannot be read ([Errno 2]",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError) as refusal:
            load_perceptual(Path(name))
        assert str(refusal.value).startswith(f"{name}: {message}")
        assert str(refusal.value).endswith("give a file with VGG-16's convolutions under torchvision's names")
        assert "\n" not in str(refusal.value)
    assert not Path("executed").exists()
