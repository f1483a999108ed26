"""What trains fastest here: short timings of threads, and of fp32, bf16 and channels-last, before the training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.tree import flatten_outputs

BF16_GAIN = 0.10
LAYOUT_GAIN = 0.05
"""A variant is taken when it saves this share of the time or more."""

_ROUNDS = 4


@dataclass(frozen=True)
class PrecisionChoice:
    """`precision` is `fp32` or `bf16`; `probe_ms` holds the smallest time per forward and backward pass of each variant."""

    precision: str
    channels_last: bool
    reason: str
    probe_ms: dict[str, float]


def fixed_choice(precision: str) -> PrecisionChoice:
    """The choice without a probe, because the options name the precision."""
    return PrecisionChoice(precision, False, f"set by precision={precision!r}", {})


def _pass_ms(module: nn.Module, inputs: Sequence[Tensor], bf16: bool) -> float:
    device = inputs[0].device.type
    start = time.perf_counter_ns()
    with torch.autocast(device, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
        outputs = flatten_outputs(module(*inputs))
    total = torch.stack([value.float().square().mean() for value in outputs.values() if value.is_floating_point()]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6


@contextlib.contextmanager
def _untouched(module: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """A block after which the module's weights, buffers, gradients and memory layout and the random state are as before."""
    saved = {name: value.detach().clone() for name, value in module.state_dict().items()}
    devices = [inputs[0].device] if inputs[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    module.load_state_dict(saved)
    module.zero_grad(set_to_none=True)


def probe_threads(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, str]:
    """The number of CPU threads to train with, all of torch's or one, and why.

    Means of interleaved passes are compared, not minima: on cores that are shared with other work, threads wait for each other at
    every operation, and a pass on all of them can take many times as long as on one.
    """
    every = torch.get_num_threads()
    spent: dict[int, list[float]] = {every: [], 1: []}
    try:
        with _untouched(module, inputs):
            for _ in range(_ROUNDS):
                for threads, seen in spent.items():
                    torch.set_num_threads(threads)
                    seen.append(_pass_ms(module, inputs, bf16=False))
    finally:
        torch.set_num_threads(every)
    means = {threads: sum(seen[1:]) / (len(seen) - 1) for threads, seen in spent.items()}
    chosen = every if means[every] <= means[1] else 1
    shown = ", ".join(f"{threads} {value:.2f} ms" for threads, value in means.items())
    return chosen, f"{chosen} of {every} threads, by a probe at the start (mean forward and backward of one batch: {shown})"


def probe_precision(module: nn.Module, inputs: Sequence[Tensor]) -> PrecisionChoice:
    """The fastest of fp32 and bf16, each with and without channels-last where an input has four axes.

    Times forward and backward passes on one batch, the variants interleaved, and compares minima. The module's weights,
    buffers and memory layout and the random state are as before afterwards. A variant that the module cannot run is left out,
    and the reason says so.
    """
    layouts = (False, True) if any(value.ndim == 4 for value in inputs) else (False,)
    variants = [(bf16, last) for bf16 in (False, True) for last in layouts]
    times: dict[tuple[bool, bool], float] = {}
    refused: list[str] = []
    with _untouched(module, inputs):
        for round_number in range(_ROUNDS):
            for variant in list(variants):
                bf16, last = variant
                module.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload]
                given = [value.contiguous(memory_format=torch.channels_last) if last and value.ndim == 4 else value for value in inputs]
                try:
                    spent = _pass_ms(module, given, bf16)
                except RuntimeError as error:
                    if variant == (False, False):
                        raise
                    variants.remove(variant)
                    times.pop(variant, None)
                    refused.append(f"{_name(variant)} does not run: {str(error).splitlines()[0]}")
                    continue
                if round_number:
                    times[variant] = min(spent, times.get(variant, spent))
    return _choose(times, refused)


def _name(variant: tuple[bool, bool]) -> str:
    return ("bf16" if variant[0] else "fp32") + (" channels_last" if variant[1] else "")


def _choose(times: dict[tuple[bool, bool], float], refused: Sequence[str]) -> PrecisionChoice:
    def best(bf16: bool) -> tuple[bool, bool]:
        plain, last = (bf16, False), (bf16, True)
        if plain not in times or (last in times and times[last] <= (1.0 - LAYOUT_GAIN) * times[plain]):
            return last
        return plain

    chosen = best(False)
    if any(variant[0] for variant in times):
        fast = best(True)
        if times[fast] <= (1.0 - BF16_GAIN) * times[chosen]:
            chosen = fast
    shown = ", ".join(f"{_name(variant)} {value:.2f} ms" for variant, value in times.items())
    reason = "; ".join([f"{_name(chosen)} was chosen by a probe at the start (forward and backward of one batch: {shown})", *refused])
    return PrecisionChoice("bf16" if chosen[0] else "fp32", chosen[1], reason, {_name(variant): value for variant, value in times.items()})
