"""Compiled functions, and CUDA graphs, which launch many kernels at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import UserError
from support.runtime import Runtime


def compiled(function: Callable[..., Any], runtime: Runtime, deterministic: bool = False) -> Callable[..., Any]:
    """torch.compile(function); or function itself, where compiling is off or, with a line, where it fails.

    Unless `deterministic`, the compiler tries several kernels on a GPU, which add in different orders.
    """
    if not runtime.compile:
        return function
    chosen: Callable[..., Any] = torch.compile(function)
    if deterministic and runtime.device.type == "cuda" and "deterministic" in torch._inductor.list_options():
        # Runtime.deterministic sets it as well, but not in the thread that compiles the backward pass.
        chosen = torch.compile(function, options={"deterministic": True})

    def call(*args: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as error:  # a compiler fails in many ways; none of them should end a run
            if chosen is function or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            first_line = "".join(str(error).strip().splitlines()[:1])[:120]
            runtime.say(f"note: torch.compile failed ({type(error).__name__}: {first_line}); going on without")
            chosen = function
        return function(*args)

    return call


class CudaGraph:
    """A function of tensors as a CUDA graph: many small kernels cost more to launch than to compute.

    In its first calls it runs as it is, and libraries choose their kernels; then it is captured, and replayed with
    copies of the arguments, whose shapes stay. No Python of it runs any more, so what changes from call to call has to
    be an argument, or a tensor that is read where it lies, such as weights.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.warm_ups, self.inputs = function, 3, list[Tensor]()
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def __call__(self, *arguments: Tensor) -> Tensor:
        here = torch.cuda.current_stream()
        if self.warm_ups > 0:
            self.warm_ups -= 1
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                output = self.function(*arguments)
            here.wait_stream(self.stream)
            return output
        if not self.inputs:
            self.inputs = [argument.clone() for argument in arguments]
            try:  # "thread_local": other threads, as NCCL's, go on
                with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.output = self.function(*self.inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.set_stream(here)  # which torch leaves as it was in the capture
                first_line = "".join(str(error.__context__ or error).strip().splitlines()[:1])[:120]
                raise UserError(f"the network can't be captured as a CUDA graph ({first_line}): it must not wait for "
                                "the GPU, as .item() does; change it, or use --compile off") from None
        torch._foreach_copy_(self.inputs, arguments)
        self.graph.replay()
        return self.output.clone()
