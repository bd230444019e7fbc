"""What the runtimes share on a GPU: a stream of their own, a captured graph, a batch that fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import InputContract
from ..engine import Run


def on_stream(run: Run, stream: torch.cuda.Stream) -> Run:
    """`run` on `stream`, in order with whatever stream the caller is on; the host never waits.

    Scratch memory and static buffers serve one call at a time, while callers alternate between
    streams to overlap copies.
    """

    def ordered(batch: Tensor) -> tuple[Tensor, ...]:
        caller = torch.cuda.current_stream(stream.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            results = run(batch)
        caller.wait_stream(stream)
        for result in results:
            # Without it the next call, from another stream, may write where this one still reads.
            result.record_stream(caller)
        return results

    return ordered


def captured(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype, stream: torch.cuda.Stream
) -> Run:
    """`run` as one CUDA graph over buffers that stay where they are, replayed on `stream`."""
    with torch.inference_mode(), torch.cuda.stream(stream):
        inputs = torch.zeros(shape, dtype=dtype, device=stream.device)
        for _ in range(2):  # what is allocated or chosen at first use does not belong in the graph
            run(inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = run(inputs)

    def replay(batch: Tensor) -> tuple[Tensor, ...]:
        inputs.copy_(batch)
        graph.replay()
        return tuple(result.clone() for result in results)

    return on_stream(replay, stream)


def fit_batch(
    prepare: Callable[[int], Run], contract: InputContract, batch_size: int, device: torch.device
) -> tuple[Run, int]:
    """`prepare(batch_size)`, tried with a full batch on a GPU; half the batch if memory runs out.

    Once, with a warning: the batch shape decides bits, so it is settled before the first sample.
    Raises torch.OutOfMemoryError when half of it does not fit either.
    """
    try:
        return _tried(prepare(batch_size), contract, batch_size, device), batch_size
    except torch.OutOfMemoryError as error:
        if batch_size == 1:
            raise
        reason = str(error).partition("\n")[0]
    half = batch_size // 2
    warnings.warn(
        f"a batch of {batch_size} does not fit into the memory of {device}; going on with "
        f"batch_size={half}, which is part of the settings ({reason})",
        stacklevel=3,
    )
    torch.cuda.empty_cache()
    return _tried(prepare(half), contract, half, device), half


@torch.inference_mode()
def _tried(run: Run, contract: InputContract, batch_size: int, device: torch.device) -> Run:
    if device.type == "cuda":
        run(torch.zeros(batch_size, *contract.shape, dtype=contract.dtype, device=device))
        torch.cuda.synchronize(device)
    return run
