"""Precision and determinism: what is computed in bfloat16, where that is fast, and the same bits in every run."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from support import code

code.register(__file__)
_SAID: set[str] = set()  # operations without a deterministic form
_WARNED: dict[Any, Any] = {}  # other warnings, by which Python shows each once


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Convolutions and linear layers in bfloat16, if wanted; all else stays in float32."""
    # Without its cache of cast weights, which a captured graph would go on reading after it was freed.
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


@contextlib.contextmanager
def deterministic(device: torch.device, wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    """If wanted, CUDA's operations give the same bits in every run; one that has no such form is said once."""
    if not wanted or device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves kernels
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
    for warning in caught:
        message = str(warning.message)
        if "does not have a deterministic implementation" not in message:
            warnings.warn_explicit(message, warning.category, warning.filename, warning.lineno, registry=_WARNED)
        elif (operation := message.split()[0]) not in _SAID:
            _SAID.add(operation)
            say(f"note: {operation} has no deterministic form on a GPU, so the same seed may give slightly other "
                "weights in another run.")
