"""Does it run on a device that is not the CPU? Tried without a GPU: PyTorch/XLA's device `xla:0`, on a CPU.

    python -m venv xla && xla/bin/pip install torch==2.9.0 torchvision==0.24.0 torch_xla==2.9.0 -r requirements.txt
    PJRT_DEVICE=CPU xla/bin/python benchmarks/device.py

Three training steps, a skipped one, a record, 40 drawn images and a small evaluation, there and on the CPU, which have
to be the same to rounding; a tensor left behind on the other device raises, as on CUDA. Counts how often the host waits
for the device in a step: never. Prints a table; exit status 1 on any difference.
"""

import contextlib
import io
import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Parser, config_of, load_digits, run_script, table

import diffusion
import record
import train
from config import UserError
from dataset import Digits
from drawing import Order, Trained, choose_labels, draw
from support import runtime
from support.extractor import load_extractor
from support.runtime import Runtime, to_uint8
from yardstick import Yardstick

TINY = ["--channels", "8", "16", "32", "--groups", "4", "--batch-size", "16", "--preview", "4", "--steps", "4"]


def seeded(*parts: Any) -> torch.Generator:
    """XLA has no generators of its own, so that the CPU's stand in, whose numbers then travel."""
    return torch.Generator().manual_seed(runtime.seed_of(*parts[1:]))


def on_the_cpu(make: Any) -> Any:
    def made(*args: Any, device: Any = "cpu", **options: Any) -> torch.Tensor:
        return make(*args, **options).to(device)

    return made


class PlainAdamW(torch.optim.AdamW):
    """Not fused, which XLA lacks; what found_inf calls for, it does itself."""

    found_inf: torch.Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "fused": False, "foreach": False, "capturable": True})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found_inf = self.__dict__.pop("found_inf")
        weights = [weight for group in self.param_groups for weight in group["params"]]
        kept = [(held, held.detach().clone()) for weight in weights for held in (weight, *self.state[weight].values())]
        super().step()
        with torch.no_grad():
            for held, old in kept:
                held.copy_(torch.where(found_inf == 1, old, held))


def work(device: torch.device, digits: Digits, test: Digits, waits: Any) -> dict[str, Any]:
    """Everything that is compared, on one device."""
    here = Runtime(device, bf16=False, compile=False)
    run = train.new_run(config_of(None, *TINY), here, digits.to(device), test.to(device))
    found: dict[str, Any] = {}
    losses, loss, learn = [], diffusion.diffusion_loss, train.learner(run)
    for step in range(4):
        bad = mock.patch.object(train, "diffusion_loss", lambda *a: loss(*a) * math.nan)
        before = waits()
        with bad if step == 2 else contextlib.nullcontext():
            run.optimizer.set_rate(1e-3)
            losses.append(train.training_step(learn, run))
        found["waits in a step"] = waits() - before
        run.unread.append(losses[-1])
        run.step += 1
    train.read_losses(run)
    found["losses of four steps, one skipped"] = torch.stack(losses).cpu().nan_to_num(-1)
    run.results.mkdir(parents=True)
    record.record(run)
    found["a record's test loss"] = torch.tensor(run.history["columns"]["test_loss"])
    labels = choose_labels(None, 0, range(40))
    trained = Trained(run.average, run.schedule, run.config, run.history)
    images = draw(trained, Order(run.config.sample, 0, range(40), labels), here)
    found["40 images"] = (images + 1) * 127.5
    labels = choose_labels(None, 0, range(200))
    more = to_uint8(draw(trained, Order(run.config.sample, 0, range(200), labels), here))
    row = Yardstick(run.train, run.test, labels, load_extractor()).measure(more, labels, neighbours=False)
    found["an evaluation's distances"] = torch.tensor([row.values["frechet"], row.values["texture"]])
    return found


def main(argv: list[str]) -> int:
    options = Parser(__doc__, "--data-dir").parse(argv)
    try:
        import torch_xla
        from torch_xla.debug import metrics
        from torch_xla.experimental import eager_mode
    except ImportError:
        raise UserError("torch_xla is not installed here; see the head of this script for an environment") from None
    eager_mode(True)
    digits, test = load_digits(config_of(options), torch.device("cpu"))

    def waits() -> int:
        return metrics.counter_value("aten::_local_scalar_dense") or 0

    with contextlib.ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        patches.enter_context(contextlib.chdir(folder))
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for module in (train, runtime):  # what XLA lacks
            patches.enter_context(mock.patch.object(module, "generator", seeded))
        for name in ("rand", "randn"):
            patches.enter_context(mock.patch.object(torch, name, on_the_cpu(getattr(torch, name))))
        found = []
        for device in (torch.device("cpu"), torch_xla.device()):
            if device.type != "cpu":  # nor has XLA these
                patches.enter_context(mock.patch.object(torch.optim, "AdamW", PlainAdamW))
                patches.enter_context(mock.patch.object(
                    torch, "inference_mode", lambda on=True: torch.no_grad() if on else contextlib.nullcontext()))
            Path(device.type).mkdir()
            with contextlib.chdir(device.type):
                found.append(work(device, digits, test, waits))
    cpu, other = found
    rows, failed = [], False
    for what, tolerance in (("losses of four steps, one skipped", 1e-4), ("a record's test loss", 1e-4),
                            ("40 images", 1.0), ("an evaluation's distances", 0.05)):
        apart = (cpu[what] - other[what]).abs().max().item()
        failed |= not apart <= tolerance
        rows.append((what, f"{apart:.1e} apart", f"at most {tolerance:g}"))
    failed |= other["waits in a step"] != 0
    rows.append(("waits in a step", other["waits in a step"], 0))
    print(table(("on xla:0, against the CPU", "found", "allowed"), rows))
    return int(failed)


if __name__ == "__main__":
    run_script(main)
