"""Kernels as machine code for one kind of GPU, for programs without PyTorch and Triton. Needs Triton, but no GPU.

A launch is recorded instead of started and compiled for any address that has the stated alignment and any size: where
Triton's launcher would look at the values of a call, nothing is assumed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import draw, keep_given, mix_codes, uniforms
from .launch import OPTIONS, Launch, recording
from .resource_cases import POINTERS

#: Pointers at the end of every kernel for scratch memory and profiling; these kernels use neither.
SPARE_POINTERS = 2

_TYPES = {int: "i32", float: "fp32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A kernel for one compute capability."""

    entry: str  #: its name in the module
    capability: int  #: 90 is 9.0
    cubin: bytes
    ptx: str
    arguments: tuple[tuple[str, str], ...]  #: name and type: "pointer", "i32" or "fp32"
    threads: int  #: of a block
    shared_bytes: int  #: of a block, to be given at the launch


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """What a kernel is compiled for, as Triton takes it, and what a launch of the result takes."""

    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    arguments: tuple[tuple[str, str], ...]  #: as of `Compiled`


def signature_of(launch: Launch, aligned: Collection[str]) -> Signature:
    """The signature of a launch for any arguments of its types; the pointers named in `aligned` are multiples of 16
    bytes. Raises ValueError for a name that is none of them.
    """
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    arguments: list[tuple[str, str]] = []
    for index, name in enumerate(inspect.signature(launch.kernel.fn).parameters):
        value = launch.arguments.get(name)
        if name in constants or value is None:
            types[name] = "constexpr"
            constants.setdefault(name, None)
        elif isinstance(value, Tensor):
            types[name] = f"*{POINTERS[value.dtype]}"
            if name in aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
            arguments.append((name, "pointer"))
        else:
            types[name] = _TYPES[type(value)]
            arguments.append((name, types[name]))
    if unknown := set(aligned) - {name for name, kind in arguments if kind == "pointer"}:
        raise ValueError(f"aligned: {', '.join(sorted(unknown))} is no pointer of {launch.kernel.__name__}")
    return Signature(types=types, constants=constants, attributes=attributes, arguments=tuple(arguments))


def compiled(launch: Launch, capability: int, aligned: Collection[str], *, ptx_version: int | None = None) -> Compiled:
    """Compiles a launch for any arguments that fit `signature_of`.

    ptx_version: 80 is 8.0; None takes what the compiler writes. Raises ValueError for a kernel that needs scratch
    memory, which a launch from outside would have to provide.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature_of(launch, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    source = ASTSource(launch.kernel, signature.types, signature.constants, signature.attributes)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # half the size, and no path of the machine that compiles
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata, ptx, arguments = made.metadata, made.asm["ptx"], signature.arguments
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{metadata.name}: needs scratch memory, which only Triton's own launcher gives")
    if (found := len(parameters(ptx))) != len(arguments) + SPARE_POINTERS:
        expected = f"{len(arguments)} and {SPARE_POINTERS} spare pointers"
        raise ValueError(f"{metadata.name}: got {found} parameters, expected {expected}; this Triton is not known")
    return Compiled(
        entry=metadata.name,
        capability=capability,
        cubin=made.asm["cubin"],
        ptx=ptx,
        arguments=arguments,
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
    )


def parameters(ptx: str) -> list[str]:
    """Declarations of a kernel's parameters in PTX, in order."""
    match = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    return [] if match is None else re.findall(r"\.param\s[^,)]*", match.group(1))


def without_spare_pointers(kernel: Compiled) -> str:
    """The kernel's PTX with exactly its own arguments, for callers that pass no others."""
    declared = parameters(kernel.ptx)
    kept = ",\n\t".join(text.strip() for text in declared[: len(kernel.arguments)])
    spare = [text.split()[-1] for text in declared[len(kernel.arguments) :]]
    ptx = re.sub(
        r"(\.entry\s+[\w$]+\s*\().*?\)", lambda found: f"{found.group(1)}\n\t{kept}\n)", kernel.ptx, flags=re.S
    )
    if used := [name for name in spare if re.search(rf"\[{re.escape(name)}\]", ptx)]:
        raise ValueError(f"{kernel.entry}: reads {', '.join(used)}, which nobody passes")
    return ptx


def draw_kernels(vocab_size: int, code_width: int, num_tokens: int, capability: int) -> dict[str, Compiled]:
    """All kernels that turn logits into codes, by name: for any batch, scale and settings.

    Tensors begin at multiples of 16 bytes but for what is one scale's part of a larger one: uniforms, tokens, what is
    given, settings and `invalid_ptr`.
    """

    def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, n, V, C, L = 2, 2, vocab_size, code_width, num_tokens
    seeds_B, codebook_VC, codes_BnC = t(B, dtype=torch.int64), t(V, C), t(B, n, C)
    uniforms_BL = t(B, L, dtype=torch.float64)
    found: dict[str, Compiled] = {}

    def add(name: str, launches: list[Launch], *aligned: str) -> None:
        (launch,) = launches
        found[name] = compiled(launch, capability, aligned)

    with recording() as launches:
        uniforms.uniforms(seeds_B, out_BL=uniforms_BL)
    add("uniforms", launches, "seeds_ptr", "out_ptr")
    for guided in (True, False):
        for smooth in (False, True):
            with recording() as launches:
                draw.draw(
                    t(2 * B if guided else B, n, V),
                    uniforms_BL[:, :n],
                    t(B),
                    t(B),
                    t(B, dtype=torch.int32),
                    t(B),
                    codebook_VC,
                    guided=guided,
                    tokens_out_Bn=t(B, L, dtype=torch.int64)[:, :n],
                    codes_out_BnC=codes_BnC,
                    invalid_out_B=t(B, dtype=torch.int32),
                    smooth_weights_out_BnV=t(B, n, V) if smooth else None,
                    seeds_B=seeds_B,
                )
            aligned = ["logits_ptr", "codebook_ptr", "codes_ptr"]
            name = f"draw{'_guided' if guided else ''}{'_smooth' if smooth else ''}"
            add(name, launches, *aligned, *(["smooth_ptr", "seeds_ptr"] if smooth else []))
    with recording() as launches:
        mix_codes.mix_codes(t(B, n, V), codebook_VC, codes_out_BnC=codes_BnC)
    add("mix_codes", launches, "weights_ptr", "codebook_ptr", "codes_ptr")
    with recording() as launches:
        keep_given.keep_given(
            t(B, L, dtype=torch.int64)[:, :n],
            t(B, L, C)[:, :n],
            tokens_out_Bn=t(B, L, dtype=torch.int64)[:, :n],
            codes_out_BnC=codes_BnC,
        )
    add("keep_given", launches, "codes_ptr")
    return found
