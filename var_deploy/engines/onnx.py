"""ONNX Runtime engine on a CPU: IO binding, caches written in place, every weight in memory once.

ONNX Runtime packs a private copy of each matrix per session, so one session per scale would hold the weights K times
over. Hence two ways to run: "symbolic", one packed session for all scales (the default: fast, weights once, and shared
between processes where they are kept: see `prepared`), and "static", one session per scale that reads the memory-mapped
file unpacked (weights once, shared in any case, but slower products).

The decoder is the bundle's graph, or the same network with fewer multiplications: see `winograd`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import WEIGHTS, Bundle, FileSeal
from ..config import HEAD_DIM
from ..cpus import usable_cpus
from ..errors import EngineError
from ..memory import release_freed_memory
from ..memory_budget import onnx_plan
from ..precision import Precision
from ..prepared import PreparedCache
from ..signature import cache_names, scale_graph_name
from ..workspace import Workspace
from .engine import Decoder, Graphs

#: A single row of a single token (one unguided image in `condition` and at scale 0) takes ONNX Runtime's matrix-vector
#: kernel, whose sums round differently. A spare row there keeps an image independent of the batch it came in.
MIN_ROWS = 2

#: Of a kept session: count up when its options change.
FORM = "1"

#: Bundles with fewer bytes of weights are loaded in a moment, so nothing is kept for them.
MIN_PREPARED = 64_000_000


@dataclass(slots=True, weakref_slot=True)
class OnnxState:
    """Buffers of one generation, bound to every step; they have at least MIN_ROWS rows.

    The caches are the workspace's: once the state has ended they are another's, so nothing else may hold them.
    """

    rows: int  # R
    conditions: dict[str, np.ndarray]  # modulation, head_modulation, start
    caches: dict[str, np.ndarray]  # name → [R, H, L, 64]; filled scale by scale, never copied
    f_hat: list[np.ndarray]  # two buffers [R, C, h, h]: a step reads one and writes the other
    turn: int = 0  # which of the two holds the current f_hat

    @property
    def f_hat_RChh(self) -> np.ndarray:
        return self.f_hat[self.turn][: self.rows]


class OnnxEngine:
    """Runs a bundle's graphs with ONNX Runtime; safe to use from several threads, one state each."""

    name = "onnx"
    max_batch = None

    def __init__(
        self,
        bundle: Bundle,
        *,
        graphs: Graphs,
        decoder: Decoder,
        threads: int | None,
        prepared: PreparedCache | None = None,
        profile: Path | None = None,
    ) -> None:
        """threads: of every session and of the winograd decoder; None takes those of `usable_cpus`.

        prepared: where weights in this machine's form are kept between runs; None keeps nothing.
        profile: a directory where every session writes the times of its operators, GRAPH_….json, when it ends.
        """
        self.precision: Precision = bundle.manifest.precision
        self._bundle = bundle
        self.threads = threads or usable_cpus().threads
        self.memory_plan = onnx_plan(bundle, decoder, self.threads)
        # Without this a session keeps the most that it ever needed, fragments included. With d16 and the decoder's
        # graph at batch 1 the peak is 2,063 MB instead of 2,319 and 1,852 stay instead of 2,319; it costs 1 % of the
        # transformer's time and 4 % of that decoder's. No arena alone: 2,187 MB; no memory patterns alone: 2,145 MB;
        # neither: 2,012 MB, but a decoder slower by a third. An allocator shared by the sessions: 2,248 MB; a device
        # allocator for weights: no change.
        self._releasing = ort.RunOptions()
        self._releasing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._profile = profile
        self._workspace = Workspace()
        self._prepared = prepared if self._seal(WEIGHTS).size >= MIN_PREPARED else None
        self._symbolic = graphs is Graphs.SYMBOLIC
        # Read once per image with few rows, so packing would cost load time and memory for nothing.
        self._condition = self._session("condition", prepack=False)
        self._finish = self._session("finish")
        self._decode = self._decoder(decoder)
        self._encoder: ort.InferenceSession | None = None  # made at the first encode: few callers need it
        self._encoder_lock = Lock()
        if self._symbolic:
            shared = self._packed_scales()
            self._scales = [shared] * bundle.manifest.var.num_scales
        else:
            names = [scale_graph_name(k) for k in range(bundle.manifest.var.num_scales)]
            self._scales = [self._session(name, prepack=False) for name in names]

    def memory_reused(self) -> int:
        return self._workspace.reused

    def begin(self, labels_R: np.ndarray) -> OnnxState:
        config, R = self._bundle.manifest.var, len(labels_R)
        labels_R = np.resize(labels_R.astype(np.int64), max(R, MIN_ROWS))
        names = [spec.name for spec in self._bundle.manifest.graphs["condition"].outputs]
        with _named_errors("condition"):
            values = self._condition.run(names, {"labels": labels_R}, self._releasing)
        cache_shape = (len(labels_R), config.num_heads, config.num_tokens, HEAD_DIM)
        shape, dtype = (2 * config.depth, *cache_shape), np.dtype(self.precision.graph_dtype)
        block = self._workspace.take(math.prod(shape) * dtype.itemsize)
        arrays = np.frombuffer(block, dtype, math.prod(shape)).reshape(shape)
        caches = dict(zip(cache_names(config.depth), arrays, strict=True))
        f_hat_shape = (len(labels_R), config.z_channels, config.latent_size, config.latent_size)
        f_hat = [np.zeros(f_hat_shape, dtype=np.float32) for _ in range(2)]
        state = OnnxState(R, dict(zip(names, values, strict=True)), caches, f_hat)
        weakref.finalize(state, self._workspace.give, block).atexit = False
        return state

    def step(self, state: OnnxState, k: int, codes_RnC: np.ndarray | None) -> np.ndarray:
        config = self._bundle.manifest.var
        n_k = config.tokens_per_scale[k]
        if codes_RnC is not None:
            state.rows = len(codes_RnC)
        rows = max(state.rows, MIN_ROWS) if n_k == 1 else state.rows
        spec = self._bundle.manifest.graphs["scales" if self._symbolic else scale_graph_name(k)]
        if codes_RnC is None:  # the symbolic graph takes codes at every scale and ignores them at the first
            codes_RnC = np.zeros((rows, n_k, config.z_channels), dtype=np.float32)
        logits_RnV = np.empty((rows, n_k, config.vocab_size), dtype=np.float32)
        caches = {name: _ort_value(cache[:rows]) for name, cache in state.caches.items()}
        values = {
            **{name: _ort_value(condition[:rows]) for name, condition in state.conditions.items()},
            **caches,
            **{f"{name}.out": cache for name, cache in caches.items()},  # the same buffer: updated in place
            "scale": _ort_value(np.array([k], dtype=np.int64)),
            "codes": _ort_value(np.ascontiguousarray(codes_RnC, dtype=np.float32)),
            "f_hat": _ort_value(state.f_hat[state.turn][:rows]),
            "f_hat.out": _ort_value(state.f_hat[1 - state.turn][:rows]),
            "logits": _ort_value(logits_RnV),
        }
        binding = self._scales[k].io_binding()
        for tensor in spec.inputs:
            binding.bind_ortvalue_input(tensor.name, values[tensor.name])
        for tensor in spec.outputs:
            binding.bind_ortvalue_output(tensor.name, values[tensor.name])
        with _named_errors(f"scale {k}, {rows} rows"):
            self._scales[k].run_with_iobinding(binding, self._releasing)
        if any(tensor.name == "f_hat.out" for tensor in spec.outputs):
            state.turn = 1 - state.turn
        return logits_RnV[: state.rows]

    def finish(self, state: OnnxState, codes_BnC: np.ndarray) -> np.ndarray:
        return self._one_by_one(self._finish, "finish", codes=codes_BnC, f_hat=state.f_hat_RChh[: len(codes_BnC)])

    def decode(self, f_hat_BChh: np.ndarray) -> np.ndarray:
        return self._decode(f_hat_BChh)

    def encode(self, pixels_B3RR: np.ndarray) -> np.ndarray:
        with self._encoder_lock:
            if self._encoder is None:
                self._encoder = self._session("encoder")
        return self._one_by_one(self._encoder, "encoder", pixels=pixels_B3RR)

    def _one_by_one(self, session: ort.InferenceSession, graph: str, **batch: np.ndarray) -> np.ndarray:
        """Runs a convolutional graph image by image: sums do not depend on the batch, and activations take least.

        On a CPU a batch is no faster.
        """
        images = zip(*batch.values(), strict=True)
        feeds = ({name: array[None] for name, array in zip(batch, image, strict=True)} for image in images)
        with _named_errors(graph):
            return np.concatenate([session.run(None, feed, self._releasing)[0] for feed in feeds])

    def _decoder(self, decoder: Decoder) -> Callable[[np.ndarray], np.ndarray]:
        """f_hat [B, C, h, h] → pixels [B, 3, R, R]."""
        if decoder is Decoder.GRAPH:
            session = self._session("decoder")
            return lambda f_hat_BChh: self._one_by_one(session, "decoder", f_hat=f_hat_BChh)
        from .winograd.decoder import WinogradDecoder  # brings a compiler, which takes half a second

        weights = self._bundle.file(WEIGHTS)
        return WinogradDecoder(
            self._bundle.manifest.vqvae,
            weights,
            self.threads,
            cache=self._prepared,
            sha256=self._seal(WEIGHTS).sha256,
            workspace=self._workspace,
        )

    def _packed_scales(self) -> ort.InferenceSession:
        """The session of the symbolic graph, whose packed matrices are mapped where they are kept."""
        graph = self._bundle.manifest.graphs["scales"].file
        if self._prepared is not None:
            weights = self._seal(WEIGHTS)
            made_from = [FORM, ort.__version__, self._seal(graph).sha256, weights.sha256]
            # Matrices as they are beside the packed ones, in float32 where they are halves.
            size = 2 * weights.size * (2 if self.precision is Precision.FP16 else 1)
            directory = self._prepared.entry(
                "scales", made_from, size, lambda into: self._session("scales", save_to=into / graph)
            )
            release_freed_memory()  # packed matrices that were this process's own, where it has just made the entry
            if directory is not None:
                try:
                    return self._session("scales", path=directory / graph)
                except EngineError as error:  # deleted meanwhile, or damaged where digests are not compared
                    self._prepared.discard(directory, error)
        return self._session("scales")

    def _seal(self, file: str) -> FileSeal:
        return self._bundle.manifest.files[file]

    def _session(
        self, name: str, *, prepack: bool = True, path: Path | None = None, save_to: Path | None = None
    ) -> ort.InferenceSession:
        """A session of a graph of the bundle, or of the file that an earlier one was saved to as it is run."""
        options = ort.SessionOptions()
        # By default ONNX Runtime counts the machine's cores and pins a thread to each, even to those that affinity
        # keeps this process from. With a number of our own threads are not pinned: pinned ones were no faster within
        # noise (2 cores), and processes that pin to the same cores share those while others rest.
        options.intra_op_num_threads = self.threads
        # Every session has threads of its own: one pool for all (`set_global_thread_pool_sizes`) would be the whole
        # process's, and ONNX Runtime then refuses every session of other code that does not ask for it. By default
        # threads wait for work at full load for a tenth of a second: in the way of the next session, of the draws, and
        # of whatever else the process does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self._profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile / name)
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
            options.log_severity_level = 3  # it warns that the file is for this machine only, which it is
            for key, value in (
                ("optimized_model_external_initializers_file_name", f"{name}.packed"),
                ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
                ("save_external_prepacked_constant_initializers", "1"),
            ):
                options.add_session_config_entry(f"session.{key}", value)
        if path is not None:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was, when saved
        path = path or self._bundle.file(self._bundle.manifest.graphs[name].file)
        with _named_errors(f"loading {path}"):
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises, which has no public base class, into an EngineError that says where."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(f"{what}: ONNX Runtime {ort.__version__} failed: {reason}") from error


def _ort_value(array: np.ndarray) -> Any:
    """An OrtValue over the array's own memory."""
    return ort.OrtValue.ortvalue_from_numpy(array)
