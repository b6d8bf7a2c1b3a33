"""The user's file of Inception weights → a network whose features are checked, and named by the file's digest.

Nothing is downloaded and nothing in the file is executed. Axes: B images of a batch, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..bundle import sha256_of
from ..errors import CheckpointError, RequestError, printable
from .inception import Inception
from .samples import ImageSet

#: First digits of the sha256 of the published conversion, which its file name carries in torch-fidelity
#: (weights-inception-2015-12-05-6726825d.pth) and pytorch-fid (pt_inception-2015-12-05-6726825d.pth).
PUBLISHED = "6726825d"
BATCH = 64
#: Buffers that count training steps, which files have or have not.
_COUNTER = "num_batches_tracked"
_ADVICE = f"give FID's Inception as torch-fidelity and pytorch-fid publish it (…-{PUBLISHED}.pth)"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class FeatureNetwork:
    """The network on its device, and which file it came from."""

    network: Inception
    device: torch.device
    path: Path
    sha256: str
    #: The published weights, by the digest's first digits or because the user gave the whole digest.
    published: bool

    @property
    def classifier_KD(self) -> np.ndarray:
        """Weight of the classifier; its bias is left out, as every Inception score does."""
        return self.network.fc.weight.detach().cpu().numpy()

    def batches(self, images: ImageSet, on_images: Callable[[int], object] = lambda _: None) -> Iterator[Features]:
        """Features of all images, in order. Raises RequestError for images, and features that are not finite."""
        done = 0
        for images_BHW3 in images.batches(BATCH):
            features = self._features(images_BHW3)
            for array in features:
                if len(bad := np.flatnonzero(~np.isfinite(array).all(axis=1))):
                    raise RequestError(
                        f"{images.path}: features of image {done + bad[0]} hold NaN or infinity, with the weights of "
                        f"{self.path}; check the weights, or compute on another device"
                    )
            done += len(images_BHW3)
            on_images(done)
            yield features

    @torch.inference_mode()
    def _features(self, images_BHW3: np.ndarray) -> Features:
        # A copy, as arrays read from a file are not writable; channels last is how the images come.
        images_B3HW = torch.tensor(images_BHW3, device=self.device).permute(0, 3, 1, 2)
        # Full float32: TensorFloat-32 would shift every feature a little on GPUs that have it, and only there.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            pooled_BD, spatial_BD = self.network(images_B3HW)
        return pooled_BD.cpu().numpy(), spatial_BD.cpu().numpy()


#: Of a batch of images: float32 (pooled [B, 2048], spatial [B, 2023]).
Features = tuple[np.ndarray, np.ndarray]


def load_features(path: Path, *, sha256: str | None = None, device: str = "auto") -> FeatureNetwork:
    """The network with the weights of a file, a .pth state dict or .safetensors.

    sha256: what the file has to have; says that these are the published weights in another form. Raises
    CheckpointError and RequestError.
    """
    where = _device(device)
    found = _digest(path)
    if sha256 is not None and found != sha256.lower():
        raise CheckpointError(f"{path}: sha256 {found}, expected {sha256}; copy it again, or correct the digest")
    state = _checked(_read(path), path)
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict(state, assign=True)
    network = network.eval().requires_grad_(False).to(where)
    # Half as fast again on a CPU; mypy's overloads of Module.to do not know the keyword.
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    published = sha256 is not None or found.startswith(PUBLISHED)
    return FeatureNetwork(network=network, device=where, path=path, sha256=found, published=published)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not has_cuda):
        raise RequestError(f"device: got {name!r}, which PyTorch {torch.__version__} cannot use here; take auto or cpu")
    return device


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_ADVICE}") from error


def _read(path: Path) -> Mapping[object, object]:
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of files from anywhere raise many kinds
        why = printable((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise CheckpointError(f"{path}: not a file of weights, or damaged ({why}); {_ADVICE}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict; {_ADVICE}")
    return content


def _all_finite(tensor: Tensor) -> bool:
    # A sum shows it at once, and needs no table of the tensor's size; it may be infinite where no element is.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _checked(content: Mapping[object, object], path: Path) -> dict[str, Tensor]:
    """All that the network has, as float32; one line for everything that does not fit."""
    with torch.device("meta"):
        expected = Inception().state_dict()
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected if key.endswith(_COUNTER)}
    state: dict[str, Tensor] = {}
    problems = [
        f"unexpected {printable(key)}" for key in content if key not in expected and not str(key).endswith(_COUNTER)
    ]
    for key in expected.keys() - counters.keys():
        found, shape = content.get(key), tuple(expected[key].shape)
        if not isinstance(found, Tensor):
            problems.append(f"missing {key} {shape}")
        elif found.layout is not torch.strided or not found.is_floating_point() or found.device.type != "cpu":
            problems.append(f"{key} is {found.dtype} {found.layout} on {found.device}, expected plain floats")
        elif tuple(found.shape) != shape:
            problems.append(f"{key} has shape {tuple(found.shape)}, expected {shape}")
        elif not _all_finite(found):
            problems.append(f"{key} holds NaN or infinite values")
        elif key.endswith("running_var") and (found < 0).any():
            problems.append(f"{key} holds negative variances")
        else:
            state[key] = found.float()
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: {'; '.join(sorted(problems)[:3])}{more}; {_ADVICE}")
    return state | counters
