"""Options that commands share, and the choice of an engine that all of those options make."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ..pipeline import Pipeline

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


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `run: EngineChoice` comes from one option per field; its own options go before."""
    hints = get_type_hints(EngineChoice, include_extras=True)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "run"]
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(EngineChoice)
        if field.name not in {parameter.name for parameter in own}
    ]

    @functools.wraps(command)
    def run_command(**values: Any) -> None:
        choice = EngineChoice(**{parameter.name: values.pop(parameter.name) for parameter in added})
        command(**values, run=choice)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def size_in_bytes(size: str | None) -> int | None:
    """Bytes of a size as people write it. Raises RequestError."""
    from ..memory_budget import bytes_from_text

    return None if size is None else bytes_from_text(size)
