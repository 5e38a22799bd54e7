"""mode train: the loop, the step, and when a run saves; what it writes down is in record.py.

A step's images, timesteps and noise are a function of (seed, step), so a run that was stopped and continued is the
run that was not. Every process of torchrun takes its share of the same global batch. The learning itself is
`learner`; `train` around it is clocks, saves and signals.
"""

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import config as configs
import dataset
from config import NO_LABEL, ROOT, Config, TrainConfig, UserError
from dataset import Digits
from diffusion import NoiseSchedule, diffusion_loss, make_schedule, stratified_timesteps
from model import UNet
from record import milestone, record, say_what_comes
from samplers import spaced_timesteps
from support import checkpoint
from support.files import lock, make_folder
from support.optimizer import Optimizer, learning_rate, update_average
from support.runtime import Captured, Runtime, compiled, generator, seed_of, stop_signals, to_unit

TRAIN_STREAM, DROPOUT_STREAM = 1, 9  # of random numbers; see drawing.py, record.py and others for the rest
SAVE_SECONDS = 30.0  # from one checkpoint to the next: what a kill costs
READ_SECONDS = 1.0  # from one look at the losses to the next, for which the host has to wait
BAD_STEPS = 20  # steps in a row without a finite loss after which a run stops
# The code that decides training.
DECISIVE = ("model.py", "diffusion.py", "dataset.py", "train.py", "support/optimizer.py")


@dataclass
class Run:
    """One run: its settings, data and device, what is learned, and how far it has come."""

    config: Config
    runtime: Runtime
    train: Digits
    test: Digits
    schedule: NoiseSchedule
    network: UNet
    average: UNet  # its weights averaged; requires no gradients
    optimizer: Optimizer
    step: int  # steps done
    history: dict[str, Any]  # "columns" of metrics.csv, running sums since its last row, seconds, skipped steps, ...
    unread: list[Tensor] = field(default_factory=list)  # losses of the latest steps, on the device, not in the history
    bad: int = 0  # skipped steps in a row

    @property
    def path(self) -> Path:
        return Path("checkpoints") / configs.run_name(self.config) / checkpoint.LAST

    @property
    def results(self) -> Path:
        return Path("results") / configs.run_name(self.config)

    def length(self, options: TrainConfig) -> int:
        """Steps of so many epochs."""
        return math.ceil(options.epochs * self.history["data"]["images"] / options.batch_size)

    def progress(self, options: TrainConfig) -> float:
        """How much of the run is over, 0 to 1: by the clock where minutes are given, else by steps."""
        if options.minutes is not None:
            return min(1.0, self.history["seconds"] / (60 * options.minutes))
        return min(1.0, self.step / self.length(options))

    def done(self) -> str:
        epochs = self.step * self.config.train.batch_size / self.history["data"]["images"]
        skipped = f", {self.history['skipped']} steps skipped" if self.history["skipped"] else ""
        return f"{self.step:,} steps, {epochs:.1f} epochs, {self.history['seconds'] / 60:.1f} minutes{skipped}"


def run(config: Config, runtime: Runtime) -> tuple[int, Config | None]:
    """Trains until the run is as long as the config says, or goes on with an unfinished run.

    Returns the exit status (128 + n after stop signal n, else 0) and, where the run's pictures are still to be drawn,
    the config to draw them with.
    """
    if config.train.batch_size < runtime.world:
        raise UserError(f"--batch-size {config.train.batch_size}: fewer images than the {runtime.world} processes; "
                        "raise it, or start fewer")
    spaced_timesteps(config.diffusion.timesteps, config.sample.steps)  # of the drawing at the end: raises now
    config = dataset.resolve(config, runtime)
    name = configs.run_name(config)
    folder, results = Path("checkpoints") / name, Path("results") / name
    runtime.only_first(lambda: [make_folder(f) and None for f in (folder, results)])
    with contextlib.ExitStack() as held:
        runtime.only_first(lambda: held.enter_context(lock(folder)))
        this = new_run(config, runtime, *(dataset.load_shared(config, split, runtime) for split in ("train", "test")))
        if config.train.fresh:
            runtime.only_first(lambda: checkpoint.set_aside(folder, results))
        before = None
        if runtime.only_first(lambda: checkpoint.is_there(folder)):
            before = runtime.everywhere(lambda: resume(this))[runtime.rank]
        signal_number = None
        if before is None or this.progress(config.train) < 1:
            say_what_comes(this, before)
            signal_number = train(this)
        elif runtime.only_first(lambda: is_drawn(this)):
            runtime.say(f"The run {name} is finished ({this.done()}, {this.path}). Draw with --mode sample, extend it "
                        "with a larger --epochs or --minutes, or start over with --fresh.")
            return 0, None
    if signal_number is not None:
        again = "the same command again" + (" without --fresh" if config.train.fresh else "")
        runtime.say(f"Stopped after step {this.step:,}; saved in {this.path}. Run {again} to go on.")
        return 128 + signal_number, None
    written = "".join(f"\n  {path}" for path in (results / "loss.png", results / "metrics.csv", this.path))
    runtime.say(f"Training is finished ({this.done()}).{written}")
    return 0, replace(config, sample=replace(config.sample, checkpoint=this.path, write=None))


def train(run: Run) -> int | None:
    """The loop, with its saves; returns the number of the signal that stopped it, or None at the end of the run."""
    options, runtime, count = run.config.train, run.runtime, len(run.train)
    learn = learner(run)
    seconds_before, started = run.history["seconds"], time.perf_counter()
    last_save = last_read = time.perf_counter()
    run.network.train()
    bar = tqdm(total=run.length(options) if options.minutes is None else None, initial=run.step, unit="img",
               unit_scale=options.batch_size, disable=not runtime.first, dynamic_ncols=True, mininterval=0.5,
               smoothing=0.05)
    with stop_signals() as stop, bar:
        while True:
            run.history["seconds"] = seconds_before + time.perf_counter() - started
            now = time.perf_counter()
            progress, signal_number, save_now, read_now = runtime.highest(
                run.progress(options), stop[0] if stop else 0, now - last_save > SAVE_SECONDS,
                now - last_read > READ_SECONDS)
            if progress >= 1 or signal_number:
                break
            if save_now or read_now:
                read_losses(run, bar)
                last_read = now
            if save_now and not run.bad:
                save(run)
                last_save = time.perf_counter()
            if options.minutes is not None and progress > 0.01:
                bar.total = round(run.step / progress)  # for the bar's ETA
            run.optimizer.set_rate(learning_rate(options, run.step, progress))
            run.unread.append(training_step(learn, run))
            run.step += 1
            bar.update()
            epoch_before, epoch = ((s * options.batch_size) / count for s in (run.step - 1, run.step))
            if milestone(epoch_before) != milestone(epoch):
                read_losses(run, bar)
                record(run)
                bar.unpause()
        read_losses(run, bar)
    if progress >= 1 and run.history["running"][1]:
        record(run)
    save(run)
    return int(signal_number) or None


def training_step(learn: Callable[..., Tensor], run: Run) -> Tensor:
    """One step of all processes, by the run's `learner`; the batch's mean loss [], nan if the step was skipped."""
    if run.config.model.dropout:
        torch.manual_seed(seed_of(run.config.seed, DROPOUT_STREAM, run.step, run.runtime.rank))
    gain = 1 - min(run.config.train.ema, (1 + run.step) / (10 + run.step))  # of the average: short-lived at first
    return learn(*draw_batch(run), torch.full((), gain, device=run.runtime.device))


def draw_batch(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Of a step, by (seed, step) alone: indices of its images [B], uniform numbers [1 + B], noise [B, 1, 28, 28]."""
    size, seed, device = run.config.train.batch_size, run.config.seed, run.runtime.device
    random = generator(device, seed, TRAIN_STREAM, run.step)
    uniform = torch.rand(1 + size, generator=random, device=device)
    noise = torch.randn(size, 1, 28, 28, generator=random, device=device)
    return dataset.batch_indices(seed, run.step, size, len(run.train), device), uniform, noise


def learner(run: Run) -> Callable[..., Tensor]:
    """What a step does with what `draw_batch` drew, and with the average's gain []; returns the mean loss [].

    A loss or gradient that is not finite never reaches the weights. All of it is decided on the device: the host
    launches the step and does not wait for it, and on a GPU it is one launch, so that no Python below runs after the
    first steps: what changes from step to step has to come in as a tensor.
    """
    options, runtime, digits, schedule = run.config.train, run.runtime, run.train, run.schedule
    ours: nn.Module = run.network if runtime.world == 1 else DistributedDataParallel(run.network)
    forward = compiled(ours, runtime)
    share, focus = slice(runtime.rank, None, runtime.world), schedule.focus

    def learn(indices: Tensor, uniform: Tensor, noise: Tensor, gain: Tensor) -> Tensor:
        t = stratified_timesteps(schedule.timesteps, options.batch_size, uniform[:1], options.focus, focus)[share]
        labels = digits.labels[indices].masked_fill(uniform[1:] < options.label_dropout, NO_LABEL)[share]
        with runtime.autocast():
            losses = diffusion_loss(forward, schedule, to_unit(digits.images[indices[share]]), labels, t,
                                    noise[share], options.clip_loss)
        # DistributedDataParallel averages over processes; the shares of the batch may differ by one image.
        loss = losses.sum() * (runtime.world / options.batch_size)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(run.network.parameters(), options.grad_clip)
        total = loss.detach()
        if runtime.world > 1:
            torch.distributed.all_reduce(total)
            total /= runtime.world
        good = torch.isfinite(norm + total)
        run.optimizer.step(good)
        update_average(run.average, run.network, gain, good)
        run.network.zero_grad()
        return torch.where(good, total, torch.nan)

    return Captured(learn) if runtime.graphs and runtime.world == 1 else learn


def read_losses(run: Run, bar: Any = None) -> None:
    """Waits for the losses of the steps since the last look, and adds them to the history in the order of the steps."""
    longest = run.bad
    for loss in torch.stack(run.unread).tolist() if run.unread else []:
        if math.isfinite(loss):
            run.history["running"] = [run.history["running"][0] + loss, run.history["running"][1] + 1]
            run.bad = 0
        else:
            run.history["skipped"] += 1
            run.bad += 1
            longest = max(longest, run.bad)
    run.unread.clear()
    if longest >= BAD_STEPS:
        give_up(run, longest)
    if bar is not None and run.history["running"][1]:
        bar.set_postfix(loss=f"{run.history['running'][0] / run.history['running'][1]:.4f}", refresh=False)


# Beginning, going on, saving


def new_run(config: Config, runtime: Runtime, train: Digits, test: Digits) -> Run:
    torch.manual_seed(seed_of(config.seed))
    network = UNet(config.model).to(runtime.device).to(memory_format=torch.channels_last)
    schedule = make_schedule(config.diffusion)
    history = {"columns": {}, "running": [0.0, 0], "seconds": 0.0, "skipped": 0, "code": code_digests(),
               "data": dataset.describe(train, config.dataset), "alpha_bar": schedule.alpha_bar}
    average = copy.deepcopy(network).eval().requires_grad_(False)
    return Run(config, runtime, train, test, schedule, network, average, Optimizer(network, config.train), 0, history)


def code_digests() -> dict[str, str]:
    """Digest of each file that decides training, so that a run isn't continued with other code unawares."""
    return {name: hashlib.sha256((ROOT / name).read_text("utf-8").encode()).hexdigest()[:16] for name in DECISIVE}


def resume(run: Run) -> TrainConfig:
    """Fills the run from its checkpoint and returns the options that it was saved with.

    Raises UserError, before anything is written, if the checkpoint is damaged or not of this same run.
    """
    path, start_over = run.path, "choose another --name, or start over with --fresh, which keeps the old file"
    saved = checkpoint.load(path)
    try:
        before, lacking = configs.from_stored(saved["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if lacking:
        run.runtime.say(f"note: {path} is older than these settings, which have their defaults: {', '.join(lacking)}")
    if changed := configs.differences(before, run.config):
        raise UserError(f"{path} was trained with other settings ({'; '.join(changed)}): go back to those, "
                        f"{start_over}")
    if saved["model"] is None or saved["optimizer"] is None:
        raise UserError(f"{path} holds only averaged weights, so it can't be trained on: {start_over}")
    history = saved["history"]
    if any(type(history.get(name)) is not type(value) for name, value in run.history.items()):
        raise UserError(f"{path}: its history is not as this version writes it: {start_over}")
    theirs, ours = ((data.get("images"), data.get("digest")) for data in (history["data"], run.history["data"]))
    if theirs != ours:
        raise UserError(f"{path} was trained on other images ({theirs[0]}, digest {theirs[1]}) than those found now "
                        f"({ours[0]}, digest {ours[1]}): {start_over}")
    edited = [name for name, digest in run.history["code"].items() if history["code"].get(name) != digest]
    if edited and not run.config.train.same_code:
        raise UserError(f"{path} was trained by other code ({', '.join(edited)} edited since): {start_over}; or say "
                        "with --same-code that it does the same")
    if history["alpha_bar"].shape != run.schedule.alpha_bar.shape or not torch.allclose(
            history["alpha_bar"], run.schedule.alpha_bar, rtol=1e-9, atol=0):
        raise UserError(f"{path} was trained with another noise schedule than diffusion.py makes now: {start_over}")
    checkpoint.load_weights(run.network, saved["model"], path)
    checkpoint.load_weights(run.average, saved["ema"], path)
    try:
        run.optimizer.load_state_dict(saved["optimizer"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({error}); start over with --fresh") from None
    run.step, run.history = saved["step"], history | {"code": run.history["code"]}
    return before.train


def save(run: Run) -> None:
    """Writes the checkpoint, in the first process alone; a failure there ends all of them."""
    def work() -> None:
        if not all(torch.isfinite(weight).all() for weight in run.network.parameters()):
            raise UserError(f"a weight is not finite after step {run.step}, so it is not saved, and {run.path} is left "
                            "as it was: start over with --fresh and a lower --lr, or --precision fp32")
        checkpoint.save(run.path, {
            "config": configs.stored(run.config), "model": run.network.state_dict(),
            "ema": run.average.state_dict(), "optimizer": run.optimizer.state_dict(), "step": run.step,
            "history": run.history})

    run.runtime.only_first(work)


def give_up(run: Run, bad: int) -> None:
    there = run.runtime.only_first(lambda: run.path.exists())
    kept = f"; {run.path} holds the weights from before" if there else ""
    raise UserError(f"the loss or its gradient was not finite in {bad} steps in a row, up to step {run.step}: "
                    f"start over with --fresh and a lower --lr, or --precision fp32{kept}")


def is_drawn(run: Run) -> bool:
    """Whether the pictures at the end of a run are newer than its checkpoint: a kill may have come before them."""
    last = run.results / "samples.npz"
    return last.exists() and last.stat().st_mtime >= run.path.stat().st_mtime
