"""Compiled functions and CUDA graphs: only for speed, so where one fails a line says so and the plain way goes on."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from support.runtime import Runtime


def compiled(function: Callable[..., Any], runtime: Runtime, deterministic: bool = False) -> Callable[..., Any]:
    """torch.compile(function); or function itself, where compiling is off or, with a line, where it fails.

    Unless `deterministic`, the compiler tries several kernels on a GPU, which add in different orders.
    """
    if not runtime.compile:
        return function
    chosen: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal chosen
        if chosen is not function:
            try:
                if chosen is None:  # here, since torch.compile itself raises for a Python that it does not support
                    chosen = torch.compile(function, options=options())
                return chosen(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler fails in many ways; none of them should end a run
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise
                runtime.say(f"note: torch.compile failed ({first_line(error)}); going on without it.")
                chosen = function
        return function(*args)

    def options() -> dict[str, Any] | None:
        # `precision.deterministic` sets it as well, but not in the thread that compiles the backward pass.
        supported = runtime.device.type == "cuda" and "deterministic" in torch._inductor.list_options()
        return {"deterministic": True} if deterministic and supported else None

    return call


class CudaGraph:
    """A function of tensors as a CUDA graph: many small kernels cost more to launch than to compute.

    In its first calls the function runs as it is, and libraries choose their kernels; then it is captured, and replayed
    with copies of the arguments, whose shapes stay. No Python of it runs any more, so what changes from call to call
    has to be an argument, or a tensor that is read where it lies, such as weights. The function is passed in each call,
    so that no method of an object keeps that object alive. One that can't be captured goes on running as it is.
    """

    WARM_UPS = 3  # calls before the one that captures

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.calls, self.inputs = runtime, 0, list[Tensor]()
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.failed = False

    def __call__(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        self.calls += 1
        if self.failed:
            return function(*arguments)
        main_stream = torch.cuda.current_stream()
        if self.calls <= self.WARM_UPS:
            self.stream.wait_stream(main_stream)
            with torch.cuda.stream(self.stream):
                output = function(*arguments)
            main_stream.wait_stream(self.stream)
            return output
        if not self.inputs:
            self.inputs = [argument.clone() for argument in arguments]
            try:  # "thread_local": other threads, as NCCL's, go on
                with without_garbage_collection(), torch.cuda.graph(
                        self.graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.output = function(*self.inputs)
            except RuntimeError as error:  # running out of memory is one: a graph has memory of its own
                torch.cuda.set_stream(main_stream)  # which torch leaves as it was in the capture
                self.failed = True
                self.runtime.say(f"note: a training step can't be captured as a CUDA graph "
                                 f"({first_line(error.__context__ or error)}), so it runs without one, more slowly.")
                return function(*arguments)
        torch._foreach_copy_(self.inputs, arguments)
        self.graph.replay()
        return self.output.clone()


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Garbage is collected before the block, not in it: another graph that is freed in a capture spoils the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])[:120]}"
