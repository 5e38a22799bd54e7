"""mode train: the loop, the averaged weights, the learning rate, progress, and when to save.

A step's images, timesteps and noise are a function of (seed, step), so a run that was stopped and continued is the
run that was not. Every process of torchrun takes its share of the same global batch.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import checkpoint
import config as configs
import dataset
import plots
import sample
from config import Config, TrainConfig, UserError
from dataset import Digits
from diffusion import NO_LABEL, Network, NoiseSchedule, diffusion_loss, fine_timesteps, make_schedule, stratified_timesteps
from model import UNet, count_parameters, gflop_per_image
from runtime import Runtime, StopSignals, compiled, generator, seed_of, to_uint8, to_unit

TRAIN_STREAM, TEST_STREAM, DROPOUT_STREAM = 1, 4, 9  # of random numbers; sample.py owns 2 and 3
SAVE_SECONDS = 30.0  # from one checkpoint to the next: what a kill costs
TEST_IMAGES = 1000  # in the fixed-noise test loss
LEVELS = 10  # bins of t in the loss by noise level
BAD_STEPS = 20  # steps in a row without a finite loss after which a run stops
PRETRAINED = Path("checkpoints/pretrained.pt")
# Training does not depend on these, so a run that is continued may have others.
FREE = ("mode", "name", "data_dir", "device", "compile", "epochs", "minutes", "preview", "fresh")


@dataclass
class State:
    """Everything that a checkpoint carries on: what is learned, and how far the run has come."""

    network: UNet
    average: AveragedModel
    optimizer: "Optimizer"
    step: int  # steps done
    history: dict[str, Any]  # "columns" of metrics.csv, running sums since its last row, seconds, skipped steps, "data"


def run(config: Config, runtime: Runtime) -> int:
    """Trains until the run is as long as the config says, or goes on with an unfinished run; then draws 256 images.

    Returns the exit status: 128 + n after stop signal n, else 0.
    """
    if config.train.batch_size < runtime.world:
        raise UserError(f"--batch-size {config.train.batch_size}: fewer images than the {runtime.world} processes; "
                        "raise it, or start fewer")
    for part, count in (("the refiner", refined_images(config)), ("the U-Net", config.train.batch_size - refined_images(config))):
        if config.model.refiner and count < runtime.world and not (part == "the U-Net" and refiner_alone(config)):
            raise UserError(f"--refiner-share {config.train.refiner_share:g}: {count} images of a batch for {part} are too few for "
                            f"{runtime.world} process{'es' * (runtime.world > 1)}; choose another share, or a larger --batch-size")
    sample.spaced_timesteps(config.diffusion.timesteps, config.sample.steps)  # of the drawing at the end: raises now
    config = dataset.resolve(config, runtime)
    name = configs.run_name(config)
    folder, results = Path("checkpoints") / name, Path("results") / name
    path = folder / checkpoint.LAST
    runtime.only_first(lambda: [sample.make_folder(f) and None for f in (folder, results)])
    with contextlib.ExitStack() as held:
        runtime.only_first(lambda: held.enter_context(checkpoint.lock(folder)))
        digits = dataset.load_shared(config, "train", runtime), dataset.load_shared(config, "test", runtime)
        state = new_state(config, runtime, describe(digits[0], config))
        if config.train.fresh:
            runtime.only_first(lambda: set_aside(folder, results))
        saved = resume(state, path, config, runtime)
        length = run_length(config.train, len(digits[0]))
        signal_number = None
        if saved is None or progress_of(state, config.train, length) < 1:
            say_what_comes(state, config, runtime, saved)
            signal_number = train(state, config, digits, runtime, path, length)
        elif refiner_alone(config) or runtime.only_first(lambda: is_drawn(results, path)):
            draw = "Join it with a U-Net (benchmarks/export_pretrained.py)" if refiner_alone(config) else "Draw with --mode sample"
            runtime.say(f"The run {name} is finished ({done(state, config.train)}, {path}). {draw}, extend it with "
                        "a larger --epochs or --minutes, or start over with --fresh.")
            return 0
    if signal_number is not None:
        again = "the same command again" + (" without --fresh" if config.train.fresh else "")
        runtime.say(f"Stopped after step {state.step:,}; saved in {path}. Run {again} to go on.")
        return 128 + signal_number
    if refiner_alone(config):
        runtime.say(f"Training is finished ({done(state, config.train)}). A refiner draws nothing by itself: benchmarks/export_pretrained.py "
                    "joins it with a U-Net.")
    else:
        runtime.say(f"Training is finished ({done(state, config.train)}). Its averaged weights draw:")
        clock = sample.Clock(runtime)
        drawing = replace(config, sample=replace(config.sample, checkpoint=path, write=None))
        sample.write_samples(sample.load_trained(drawing, runtime), drawing, runtime, clock)
    runtime.say(f"  {results / 'loss.png'}\n  {results / 'metrics.csv'}\n  {path}")
    if config.dataset == "generated":
        runtime.say(dataset.NOTICE)
    return 0


def train(state: State, config: Config, digits: tuple[Digits, Digits], runtime: Runtime, path: Path,
          length: int) -> int | None:
    """The loop, with its saves; returns the number of the signal that stopped it, or None at the end of the run."""
    options = config.train
    schedule = make_schedule(config.diffusion)
    network: nn.Module = state.network
    if runtime.world > 1:
        network = DistributedDataParallel(state.network)
    forward = compiled(network, runtime)
    count = len(digits[0])
    minutes_before, started = state.history["seconds"], time.perf_counter()
    speed = SpeedReport(state.step)
    last_save, bad = time.perf_counter(), 0
    state.network.train()
    bar = tqdm(total=length if options.minutes is None else None, initial=state.step, unit_scale=options.batch_size, unit="img",
               disable=not runtime.first, dynamic_ncols=True, mininterval=0.5, smoothing=0.05)
    with StopSignals() as stop, bar:
        while True:
            state.history["seconds"] = minutes_before + time.perf_counter() - started
            due = time.perf_counter() - last_save > SAVE_SECONDS and not bad
            progress, signal_number, save_now = runtime.highest(progress_of(state, options, length), stop.received or 0, due)
            if progress >= 1 or signal_number:
                break
            if save_now:
                save(state, config, path, runtime)
                last_save = time.perf_counter()
            if options.minutes is not None and progress > 0.01:
                bar.total = round(state.step / progress)  # for the bar's ETA
            state.optimizer.set_rate(learning_rate(options, state.step, progress))
            loss = training_step(forward, state, schedule, digits[0], config, runtime)
            state.step += 1
            if loss is None:
                state.history["skipped"] += 1
                bad += 1
                if bad >= BAD_STEPS:
                    kept = f"; {path} holds the weights from before" if runtime.only_first(lambda: path.exists()) else ""
                    raise UserError(f"the loss or its gradient was not finite in {bad} steps in a row, the last one step {state.step}: "
                                    f"start over with --fresh and a lower --lr, or --precision fp32{kept}")
            else:
                bad = 0
                state.history["running"][0] += loss
                state.history["running"][1] += 1
            bar.update()
            if runtime.first and state.history["running"][1]:
                bar.set_postfix(loss=f"{state.history['running'][0] / state.history['running'][1]:.4f}", refresh=False)
            speed.tick(state.step, config, length, runtime)
            epoch_before, epoch = ((s * options.batch_size) / count for s in (state.step - 1, state.step))
            if milestone(epoch_before) != milestone(epoch):
                record(state, config, schedule, digits[1], count, runtime)
                bar.unpause()
    if progress >= 1 and state.history["running"][1]:
        record(state, config, schedule, digits[1], count, runtime)
    save(state, config, path, runtime)
    return int(signal_number) or None


def training_step(forward: Network, state: State, schedule: NoiseSchedule, digits: Digits, config: Config,
                  runtime: Runtime) -> float | None:
    """One step of all processes on the batch of (seed, step); the batch's mean loss, or None if the step was skipped.

    A loss or gradient that is not finite never reaches the weights.
    """
    options = config.train
    images, labels, t, noise = batch(config, state.step, digits, schedule, runtime)
    if config.model.dropout:
        torch.manual_seed(seed_of(config.seed, DROPOUT_STREAM, state.step, runtime.rank))
    with runtime.autocast():
        losses = diffusion_loss(forward, schedule, images, labels, t, noise, options.clip_loss)
    # DistributedDataParallel averages over processes; the shares of the batch may differ by one image.
    loss = losses.sum() * (runtime.world / options.batch_size)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), options.grad_clip)
    total = loss.detach()
    if runtime.world > 1:
        torch.distributed.all_reduce(total)
        total /= runtime.world
    finite = bool(torch.isfinite(norm + total))
    if finite:
        state.optimizer.step()
        state.average.update_parameters(state.network)
    state.network.zero_grad()
    return total.item() if finite else None


def batch(config: Config, step: int, digits: Digits, schedule: NoiseSchedule, runtime: Runtime) -> tuple[Tensor, ...]:
    """This process's share of the images in [-1, 1], labels, t and noise of a step: a function of (seed, step)."""
    size, device = config.train.batch_size, runtime.device
    share = slice(runtime.rank, None, runtime.world)
    indices = dataset.batch_indices(config.seed, step, size, len(digits))[share].to(device)
    random = generator(device, config.seed, TRAIN_STREAM, step)
    offset, *dropped = torch.rand(1 + size, generator=random, device=device).split([1, size])
    noise = torch.randn(size, 1, 28, 28, generator=random, device=device)[share]
    fine, refined = refined_images(config), config.model.refiner
    t = refined + stratified_timesteps(schedule.timesteps - refined, size - fine, offset)
    if fine:
        t = torch.cat([fine_timesteps(schedule, refined, fine, offset), t])
    labels = digits.labels[indices].masked_fill(dropped[0][share] < config.train.label_dropout, NO_LABEL)
    return to_unit(digits.images[indices]), labels, t[share], noise


def refined_images(config: Config) -> int:
    """How many images of a batch are for the refiner."""
    return round(config.train.refiner_share * config.train.batch_size) if config.model.refiner else 0


def refiner_alone(config: Config) -> bool:
    return config.model.refiner > 0 and config.train.refiner_share == 1


class Optimizer:
    """AdamW, or Muon (arXiv 2510.19376 for U-Nets) for the matrices of inner convolutions with AdamW for all else.

    Muon's update is scaled to AdamW's size (2502.16982, section 2.2), so both share one rate and one decay.
    """

    def __init__(self, network: UNet, options: TrainConfig) -> None:
        inner = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1 and options.optimizer == "muon"]
        chosen = {id(p) for p in inner}
        self.matrices = [(nn.Parameter(as_matrix(p.detach())), p) for p in inner]  # the same memory, seen as a matrix
        assert all(matrix.data_ptr() == p.data_ptr() for matrix, p in self.matrices)
        rest = [p for p in network.parameters() if id(p) not in chosen]
        common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
        self.parts: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=True, **common)}
        if self.matrices:
            self.parts["muon"] = torch.optim.Muon([m for m, _ in self.matrices], adjust_lr_fn="match_rms_adamw", **common)

    def set_rate(self, rate: float) -> None:
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        for matrix, parameter in self.matrices:
            matrix.grad = None if parameter.grad is None else as_matrix(parameter.grad)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises LookupError, ValueError, TypeError or AttributeError for anything but the state of such an optimizer."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            for weight, values in part.state.items():  # torch does not look at shapes
                if any(value.ndim and value.shape != weight.shape for value in values.values()):
                    raise ValueError("its shapes are not those of the weights")


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight [a, b, k, k] as [a, k * k * b]: a view where it is channels_last. a is out, transposed: in."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def moving_average(network: UNet, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, its decay warmed up as (1 + n) / (10 + n) so that the start is forgotten."""
    @torch.no_grad()
    def update(averages: Any, weights: Any, updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update)


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """The rate of a step: risen over the warm-up, then decayed over the run, of which `progress` (0 to 1) is over."""
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[options.lr_schedule]
    return options.lr * decay * min(1.0, (step + 1) / max(1, options.warmup))


def run_length(options: TrainConfig, count: int) -> int:
    """Steps of a run of so many epochs."""
    return math.ceil(options.epochs * count / options.batch_size)


def progress_of(state: State, options: TrainConfig, length: int) -> float:
    """How much of the run is over, 0 to 1: by the clock where minutes are given, else by steps."""
    if options.minutes is not None:
        return min(1.0, state.history["seconds"] / (60 * options.minutes))
    return min(1.0, state.step / length)


def new_state(config: Config, runtime: Runtime, data: dict[str, Any]) -> State:
    torch.manual_seed(seed_of(config.seed))
    network = UNet(config.model).to(runtime.device).to(memory_format=torch.channels_last)
    if refiner_alone(config):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("refiner."))
    history = {"columns": {}, "running": [0.0, 0], "seconds": 0.0, "skipped": 0, "data": data}
    return State(network, moving_average(network, config.train.ema), Optimizer(network, config.train), 0, history)


def resume(state: State, path: Path, config: Config, runtime: Runtime) -> TrainConfig | None:
    """Fills state from the run's checkpoint, if there is one, and returns the options that it was saved with.

    Raises UserError, in every process and before anything is written, if it is damaged or not of this same run.
    """
    if runtime.only_first(lambda: is_there(path)):
        return runtime.everywhere(lambda: read_state(state, path, config))[runtime.rank]
    return None


def is_there(path: Path) -> bool:
    previous = path.with_name(checkpoint.PREVIOUS)
    if not path.exists() and previous.exists():
        raise UserError(f"{path}: it is gone, but {previous} is there: rename it to {path.name} to go on from there, or use --fresh")
    return path.exists()


def read_state(state: State, path: Path, config: Config) -> TrainConfig:
    saved = checkpoint.load(path)
    try:
        before = configs.from_dict(Config, saved["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    changed = differences(saved["config"], configs.to_dict(config))
    if changed:
        raise UserError(f"{path} was trained with other settings ({'; '.join(changed)}): go back to those, choose another --name, "
                        "or start over with --fresh, which keeps the old file")
    if saved["model"] is None or saved["optimizer"] is None:
        raise UserError(f"{path} holds only averaged weights, so it can't be trained on: choose another --name, or use --fresh")
    history = saved["history"]
    if any(type(history.get(name)) is not type(value) for name, value in state.history.items()):
        raise UserError(f"{path}: its history is not as this version writes it: choose another --name, or start over with --fresh")
    theirs, ours = ((data.get("images"), data.get("digest")) for data in (history["data"], state.history["data"]))
    if theirs != ours:
        raise UserError(f"{path} was trained on other images ({theirs[0]}, digest {theirs[1]}) than those found now ({ours[0]}, digest "
                        f"{ours[1]}): choose another --name, or start over with --fresh")
    checkpoint.load_weights(state.network, saved["model"], path)
    checkpoint.load_weights(state.average.module, saved["ema"], path)
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({error}); start over with --fresh") from None
    state.step, state.history = saved["step"], history
    state.average.n_averaged.fill_(state.step - state.history["skipped"])
    return before.train


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings on which training depends and that are not the same, each with both values."""
    def flat(values: dict[str, Any]) -> dict[str, Any]:
        inner = {name: value for group in ("model", "diffusion", "train") for name, value in values.get(group, {}).items()}
        return {name: {**values, **inner}.get(name) for name in {**values, **inner} if not isinstance(values.get(name), dict)}

    before, now = flat(saved), flat(wanted)
    return [f"{name.replace('_', '-')} was {before.get(name)}, now {now.get(name)}" for name in now
            if name not in FREE and before.get(name) != now.get(name)]


def save(state: State, config: Config, path: Path, runtime: Runtime) -> None:
    """Writes the checkpoint, in the first process alone; a failure there ends all of them."""
    def work() -> None:
        if not all(torch.isfinite(weight).all() for weight in state.network.parameters()):
            raise UserError(f"a weight is not finite after step {state.step}, so it is not saved, and {path} is left as it was: start "
                            "over with --fresh and a lower --lr, or --precision fp32")
        checkpoint.save(path, {
            "config": configs.to_dict(config), "model": state.network.state_dict(), "ema": state.average.module.state_dict(),
            "optimizer": state.optimizer.state_dict(), "step": state.step, "history": state.history})

    runtime.only_first(work)


def set_aside(folder: Path, results: Path) -> None:
    """Keeps what an earlier run left under new names, for --fresh: checkpoints/NAME/old1-last.pt, results/NAME/old1/."""
    number = next(n for n in itertools.count(1) if not (list(folder.glob(f"old{n}-*")) or (results / f"old{n}").exists()))
    new = {path: results / f"old{number}" / path.name for path in results.iterdir() if path.is_file()}
    new |= {folder / name: folder / f"old{number}-{name}" for name in (checkpoint.LAST, checkpoint.PREVIOUS) if (folder / name).exists()}
    try:
        for old_path, new_path in new.items():
            new_path.parent.mkdir(exist_ok=True)
            old_path.rename(new_path)
    except OSError as error:
        raise UserError(f"{folder}: its checkpoint can't be renamed for --fresh ({error.strerror}); make it writable, or choose "
                        "another --name") from None


def is_drawn(results: Path, path: Path) -> bool:
    """Whether the pictures at the end of a run are newer than its checkpoint: a kill may have come before them."""
    last = results / "samples.npz"
    return last.exists() and last.stat().st_mtime >= path.stat().st_mtime


def describe(digits: Digits, config: Config) -> dict[str, Any]:
    """What a checkpoint says of its training images: name, count, digest, and mean and standard deviation in [0, 1]."""
    pixels = digits.images.float() / 255
    content = hashlib.sha256(digits.images.cpu().numpy().tobytes() + digits.labels.cpu().numpy().tobytes())
    return {"name": config.dataset, "images": len(digits), "digest": content.hexdigest()[:16],
            "mean": round(pixels.mean().item(), 4), "std": round(pixels.std().item(), 4)}


def milestone(epoch: float) -> int:
    """Number of the last point of record passed: 1/16, ..., 1/2, 0.7, 1, 1.4, 2, ... epochs."""
    return math.floor(2 * math.log2(max(epoch, 1 / 16)) + 1e-9)


def record(state: State, config: Config, schedule: NoiseSchedule, test: Digits, count: int, runtime: Runtime) -> None:
    """Adds a row to metrics.csv, and draws loss.png and a preview, with the averaged weights."""
    network = state.average.module.eval()
    levels = test_loss(network, schedule, test, config, runtime)
    total, steps = state.history["running"]
    size = schedule.timesteps / LEVELS
    row = {"step": state.step, "epoch": round(state.step * config.train.batch_size / count, 6),
           "images": state.step * config.train.batch_size, "train_loss": total / max(1, steps),
           "test_loss": float(np.nanmean(levels)), "skipped": state.history["skipped"],
           **{f"test_loss_t{round(i * size) + 1}-{round((i + 1) * size)}": level for i, level in enumerate(levels)},
           "seconds": round(state.history["seconds"], 1)}
    columns = state.history["columns"]
    before = max(map(len, columns.values()), default=0)
    for name in {**columns, **row}:  # a run begun by another version may have other columns
        columns.setdefault(name, [math.nan] * before).append(row.get(name, math.nan))
    state.history["running"] = [0.0, 0]
    folder = Path("results") / configs.run_name(config)
    if config.train.preview and not refiner_alone(config):
        options = replace(config.sample, sampler="dpmpp-sde", steps=min(10, schedule.timesteps), digits="0123456789",
                          guidance=float(config.train.label_dropout < 1),
                          eta=0.0, variance="posterior")
        indices = range(config.train.preview)
        labels = sample.choose_labels(options.digits, config.seed, indices)
        x = sample.draw(network, schedule, options, config.seed, indices, labels, runtime)
        runtime.only_first(lambda: plots.save_grid(folder / f"preview-{state.step:07d}.png", to_uint8(x),
                                                   max(1, round(len(indices) ** 0.5)), {"step": str(state.step)}))
    runtime.only_first(lambda: write_history(folder, state.history["columns"], config, count))


def test_loss(network: nn.Module, schedule: NoiseSchedule, test: Digits, config: Config, runtime: Runtime) -> list[float]:
    """Mean loss in each tenth of the noise levels, over fixed images, timesteps and noise, so that runs compare."""
    number = min(TEST_IMAGES, len(test))
    random = generator("cpu", TEST_STREAM)
    t = stratified_timesteps(schedule.timesteps, number, torch.tensor(0.5))
    if refiner_alone(config):
        t = fine_timesteps(schedule, config.model.refiner, number, torch.tensor(0.5))
    t = t[torch.randperm(number, generator=random)]
    noise = torch.randn(number, 1, 28, 28, generator=random)
    losses = []
    with torch.inference_mode(), runtime.autocast():
        for part in torch.arange(number).split(250):
            x0, labels = to_unit(test.images[part.to(runtime.device)]), test.labels[part.to(runtime.device)]
            losses.append(diffusion_loss(network, schedule, x0, labels, t[part].to(runtime.device), noise[part].to(runtime.device),
                                         config.train.clip_loss))
    loss, level = torch.cat(losses).double().cpu(), (t - 1) * LEVELS // schedule.timesteps
    return [loss[level == i].mean().item() if (level == i).any() else math.nan for i in range(LEVELS)]


def write_history(folder: Path, columns: dict[str, list[Any]], config: Config, count: int) -> None:
    """metrics.csv and loss.png, whole, from what the checkpoint knows."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values()))
    checkpoint.write_atomically(folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))
    plots.save_losses(folder / "loss.png", for_plot(columns), reference(config), {"config": str(config.diffusion)},
                      epoch_size=count)


def for_plot(columns: dict[str, list[Any]]) -> dict[str, Any]:
    levels = {name.removeprefix("test_loss_t"): values for name, values in columns.items() if name.startswith("test_loss_t")}
    return {"images": columns["images"], "train_loss": columns["train_loss"], "test_images": columns["images"],
            "test_loss": columns["test_loss"], "by_level": levels}


@functools.lru_cache
def reference(config: Config) -> dict[str, Any] | None:
    """The losses of the weights that come with the project, where they measure the same thing."""
    try:
        shipped = checkpoint.load(PRETRAINED)
    except UserError:
        return None
    theirs, ours = ((c["diffusion"], c["train"].get("clip_loss", False)) for c in (shipped["config"], configs.to_dict(config)))
    data = shipped["history"].get("data", {})
    if theirs != ours or config.model.refiner or data.get("name") != config.dataset or not shipped["history"].get("columns"):
        return None
    return for_plot(shipped["history"]["columns"])


def say_what_comes(state: State, config: Config, runtime: Runtime, before: TrainConfig | None) -> None:
    """Before a run; `before`: the options of a run that goes on, as they were when it was saved."""
    name, options = configs.run_name(config), config.train
    runtime.say(f"Training {name} for {aim(options)} on {runtime.name()}"
                + (f", {runtime.world} processes" if runtime.world > 1 else "") + f", {'bf16' if runtime.bf16 else 'fp32'}: "
                f"{count_parameters(state.network) / 1e6:.2f} M parameters, {gflop_per_image(config.model):.3f} GFLOP per image"
                + (f" above t = {config.model.refiner}." if config.model.refiner else "."))
    if before is not None:
        was, now = (learning_rate(o, state.step, progress_of(state, o, run_length(o, state.history["data"]["images"])))
                    for o in (before, options))
        runtime.say(f"Going on with the run in checkpoints/{name} ({done(state, options)}), at a learning rate of {now:.2g}.")
        if aim(before) != aim(options):
            end = "stays there" if options.lr_schedule == "constant" else "falls to zero at the new end"
            runtime.say(f"Its length is now {aim(options)}, no longer {aim(before)}: the learning rate goes from {was:.2g} to {now:.2g}, "
                        f"as if that had been its length from the start, and {end}.")


def aim(options: TrainConfig) -> str:
    return f"{options.minutes:g} minutes" if options.minutes is not None else f"{options.epochs} epoch{'s' * (options.epochs != 1)}"


def done(state: State, options: TrainConfig) -> str:
    epochs = state.step * options.batch_size / state.history["data"]["images"]
    skipped = f", {state.history['skipped']} steps skipped" if state.history["skipped"] else ""
    return f"{state.step:,} steps, {epochs:.1f} epochs, {state.history['seconds'] / 60:.1f} minutes{skipped}"


class SpeedReport:
    """Says once, after a few measured steps, how long the run will take."""

    def __init__(self, first_step: int) -> None:
        self.start, self.end = first_step + 3, first_step + 13
        self.began = 0.0

    def tick(self, step: int, config: Config, length: int, runtime: Runtime) -> None:
        if step == self.start:
            runtime.synchronize()
            self.began = time.perf_counter()
        elif step == self.end and runtime.first:
            runtime.synchronize()
            seconds = (time.perf_counter() - self.began) / (self.end - self.start)
            speed = f"{config.train.batch_size / seconds:,.0f} images/s"
            left = seconds * (length - step)
            if config.train.minutes is not None:
                text = f"{speed}: {config.train.minutes:g} minutes are about {60 * config.train.minutes / seconds:,.0f} steps"
            else:
                text = f"{speed}: {config.train.epochs} epochs take about {duration(left)} on this {runtime.device.type.upper()}"
                text += "; --minutes 10 gives a first result" if left > 1200 else ""
            tqdm.write(text)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
