"""Options that commands share, and the choice of an engine that all of those options make."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..errors import RequestError

if TYPE_CHECKING:
    from ..bundle import Manifest
    from ..pipeline import Pipeline
    from ..schedules import Sampling

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory.")]
VarFile = Annotated[
    Path, typer.Option("--var", metavar="PATH", help="VAR checkpoint: .pth, .safetensors, or RUN/checkpoints/step_….")
]
VaeFile = Annotated[
    Path, typer.Option("--vae", metavar="PATH", help="VQVAE checkpoint: .pth, .safetensors, or RUN/checkpoints/step_….")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
EngineName = Annotated[str, typer.Option(help="Engine: auto, onnx, torch or tensorrt.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")]
PrecisionName = Annotated[
    str, typer.Option(help="auto: the bundle's; engine torch makes fp16, bf16, int8, fp8 of fp32.")
]
DecodeSlice = Annotated[int | None, typer.Option(min=1, help="Images the decoder takes at a time (torch engine).")]
CompileDecoder = Annotated[bool, typer.Option("--compile-decoder", help="Decoder by torch.compile (torch engine).")]
Plans = Annotated[str | None, typer.Option(metavar="NAME", help="Directory of plans (tensorrt engine).")]
Draw = Annotated[str, typer.Option(help="Where tokens are drawn: device or host (tensorrt; onnx on a GPU).")]
Provider = Annotated[str, typer.Option(help="cuda or tensorrt (onnx engine on a GPU).")]
AllowCpu = Annotated[bool, typer.Option("--allow-cpu", help="Run there what the provider lacks (onnx on a GPU).")]
Graphs = Annotated[str, typer.Option(help="symbolic: one graph for all scales; static: one per scale.")]
Decoder = Annotated[str, typer.Option(help="auto, graph or winograd: fewer multiplications (onnx engine).")]
Cache = Annotated[
    bool, typer.Option(help="Keep weights in this machine's form for faster starts: see the command cache.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that compute; default one per core (onnx engine).")]
MemoryLimit = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to stay within, in MB or as 4GB; default what is free.")
]
Guidance = Annotated[str | None, typer.Option(help="Strength at the last scale, or one per scale: 0,0.5,1,…")]
Temperature = Annotated[str | None, typer.Option(help="Divides the logits; one, or one per scale.")]
TopK = Annotated[str | None, typer.Option(help="Keep the k likeliest tokens; 0 is off; one, or one per scale.")]
TopP = Annotated[str | None, typer.Option(help="Then keep probability p; 0 is off; one, or one per scale.")]
Smooth = Annotated[bool | None, typer.Option("--smooth/--no-smooth", help="Mix codes instead of drawing one.")]
SmoothScales = Annotated[str | None, typer.Option(metavar="K,K,…", help="At these scales alone, counted from 0.")]
Preset = Annotated[str | None, typer.Option(help="Published settings: paper-fid, paper-visual or paper-edit.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineChoice:
    """How a bundle is run, as `var_deploy.load` takes it; one option of the command line per field."""

    engine: EngineName = "auto"
    device: Device = "auto"
    precision: PrecisionName = "auto"
    graphs: Graphs = "symbolic"
    decoder: Decoder = "auto"
    cache: Cache = True
    threads: Threads = None
    memory_limit: MemoryLimit = None
    decode_slice: DecodeSlice = None
    compile_decoder: CompileDecoder = False
    plans: Plans = None
    draw: Draw = "device"
    provider: Provider = "cuda"
    allow_cpu: AllowCpu = False

    def arguments(self) -> dict[str, Any]:
        """What `var_deploy.load` takes besides the bundle. Raises RequestError."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return given | {"memory_limit": size_in_bytes(self.memory_limit)}

    def load(self, bundle: Path) -> Pipeline:
        """Raises BundleError, EngineError and RequestError."""
        from ..pipeline import load

        return load(bundle, **self.arguments())


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingChoice:
    """How tokens are drawn, as `Pipeline.generate` takes it; one option of the command line per field."""

    guidance: Guidance = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    smooth: Smooth = None
    smooth_scales: SmoothScales = None
    preset: Preset = None

    def options(self, num_scales: int) -> Sampling:
        """Raises RequestError for what is no number; what the numbers may be is checked where a request enters."""
        smooth: bool | list[bool] | None = self.smooth
        if self.smooth_scales is not None:
            scales = numbers("smooth-scales", self.smooth_scales, int)
            if self.smooth is not None or not all(0 <= k < num_scales for k in scales):
                got = self.smooth_scales if self.smooth is None else f"{self.smooth_scales} and --smooth or --no-smooth"
                raise RequestError(f"smooth-scales: got {got}, expected scales from 0 to {num_scales - 1} instead")
            smooth = [k in scales for k in range(num_scales)]
        return {
            "guidance": _one_or_more("guidance", self.guidance, float),
            "temperature": _one_or_more("temperature", self.temperature, float),
            "top_k": _one_or_more("top-k", self.top_k, int),
            "top_p": _one_or_more("top-p", self.top_p, float),
            "smooth": smooth,
            "preset": self.preset,
        }


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """Numbers between commas. Raises RequestError."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "4,60,900" if kind is int else "0,0.5,1"
        raise RequestError(f"{name}: got {text!r}, expected numbers like {example}") from None


def _one_or_more(name: str, text: str | None, kind: type) -> Any:
    if text is None:
        return None
    values = numbers(name, text, kind)
    return values if len(values) > 1 else values[0]


def class_labels(manifest: Manifest, classes: list[str]) -> list[int | str]:
    """As the library takes them: what is no name is an id."""
    names = manifest.class_names or ()
    return [c if c in names or not re.fullmatch("-?[0-9]+", c) else int(c) for c in classes]


def with_options(parameter: str, choice: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command whose parameter is an object of options: one option of the command line per field.

    Options that the command has itself stay its own.
    """
    hints = get_type_hints(choice, include_extras=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != parameter]
        added = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(choice)
            if field.name not in {p.name for p in own}
        ]

        @functools.wraps(command)
        def run_command(**values: Any) -> None:
            chosen = choice(**{p.name: values.pop(p.name) for p in added})
            command(**values, **{parameter: chosen})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in parameters}
        return run_command

    return decorate


#: For a command with `run: EngineChoice`, and one with `sampling: SamplingChoice`.
with_engine_options = with_options("run", EngineChoice)
with_sampling_options = with_options("sampling", SamplingChoice)


def size_in_bytes(size: str | None) -> int | None:
    """Bytes of a size as people write it. Raises RequestError."""
    from ..memory_budget import bytes_from_text

    return None if size is None else bytes_from_text(size)
