"""The state of a training run: settings, data, learner and progress; how it starts, resumes and is saved."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from config import Config, TrainConfig, UserError
from dataset import LabelledImages, describe
from model import UNet
from sample import LoadedModel, load_checkpoint
from support import checkpoint, code
from support.runtime import Runtime, fast_bf16
from support.selection import resolve, run_exists, run_path
from support.settings import differences, network_settings, stored, training_settings
from training.optimizer import progress
from training.step import Learner

BAD_STEPS = 20  # steps in a row without a finite loss after which a run stops


class Diverged(UserError):
    """The loss, its gradient or a weight is not finite any more; says what happened, but not what to do."""


@dataclass
class TrainingState:
    """One run. `history` is saved with it: "columns" of metrics.csv, running sums since its last row, seconds, ..."""

    config: Config  # settled: with its name, and fp32 or bf16 as precision
    runtime: Runtime
    train: LabelledImages
    test: LabelledImages
    learner: Learner
    history: dict[str, Any]
    path: Path  # of its checkpoint
    results: Path  # folder
    step: int = 0  # steps done
    pending_losses: list[Tensor] = field(default_factory=list)  # of the latest steps, on the device, not yet read
    skipped_in_a_row: int = 0

    def epoch(self, step: int) -> float:
        return step * self.config.train.batch_size / self.history["data"]["images"]

    def progress(self, options: TrainConfig) -> float:
        """The part of the run that is done, 0 to 1, had it these options."""
        return progress(options, self.history["data"]["images"], self.step, self.history["seconds"])

    def effort(self) -> str:
        skipped = f", {self.history['skipped']} steps skipped" if self.history["skipped"] else ""
        return (f"{self.step:,} steps, {self.epoch(self.step):.1f} epochs, {self.history['seconds'] / 60:.1f} "
                f"minutes{skipped}")


def initial_model(config: Config, runtime: Runtime) -> LoadedModel | None:
    """The model of --init, from whose averaged weights a new run starts; raises UserError.

    A run that resumes takes its own checkpoint, which has the same network: the one it started from may be gone.
    """
    if config.train.init is None:
        return None
    name, init = config.name, config.train.init
    model = load_checkpoint(runtime.on_rank0(lambda: run_path(name) if name and not config.train.fresh and
                                             run_exists(name) else resolve(init, "--init")), runtime)
    if model.schedule.prediction != config.diffusion.prediction:
        raise UserError(f"--init {config.train.init}: its network predicts {model.schedule.prediction}, not "
                        f"{config.diffusion.prediction}; add --prediction {model.schedule.prediction}")
    return model


def new_state(config: Config, runtime: Runtime, train: LabelledImages, test: LabelledImages) -> TrainingState:
    """A run at its start; precision auto becomes what this device is fast at."""
    if config.train.batch_size < runtime.world:
        raise UserError(f"--batch-size {config.train.batch_size}: fewer images than the {runtime.world} processes; "
                        "raise it, or start fewer")
    if config.precision == "auto":
        config = replace(config, precision=runtime.precision)
    model = initial_model(config, runtime)
    if model:
        config = replace(config, model=network_settings(model.settings)[0])
    learner = Learner(config, train, runtime)
    history: dict[str, Any] = {"columns": {}, "running": [0.0, 0], "seconds": 0.0, "skipped": 0,
                               "code": dict(code.IMPORTED), "data": describe(train, config.dataset),
                               "alpha_bar": learner.schedule.alpha_bar}
    if model:
        same_classes = model.data.get("digest") == history["data"]["digest"]
        learner.start_from(cast(UNet, model.network), same_classes=same_classes)
        history["init"] = {"weights": model.digest, "same_classes": same_classes}
    name = str(config.name)
    return TrainingState(config, runtime, train, test, learner, history, run_path(name), Path("results", name))


def resume(state: TrainingState, precision: str) -> TrainConfig:
    """Fills the state from its checkpoint and returns the options that it was saved with.

    If `precision`, which the user gave, is "auto", the run goes on in the one that it began with.
    Raises UserError, before anything is written, if the checkpoint is damaged or not of this same run.
    """
    path, start_over = state.path, "choose another --name, or start over with --fresh, which keeps the old file"
    saved = checkpoint.load(path)
    try:
        before, assumed = training_settings(saved["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if before.precision == "auto":  # as versions up to 0.2 stored it; it was bf16 on GPUs alone
        device = state.runtime.device
        before = replace(before, precision="bf16" if device.type != "cpu" and fast_bf16(device) else "fp32")
    if precision == "auto":
        state.config = state.learner.config = replace(state.config, precision=before.precision)
    if changed := differences(stored(before), stored(state.config)):
        older = f"; the file is older than some of these settings ({', '.join(assumed)})" if assumed else ""
        values = "; ".join(f"{name} was {before}, now {now}" for name, before, now in changed)
        raise UserError(f"{path} was trained with other settings ({values}{older}): go back to those, {start_over}")
    if saved["model"] is None or saved["optimizer"] is None:
        raise UserError(f"{path} holds only averaged weights, so it can't be trained on: {start_over}")
    history = saved["history"]
    if any(type(history.get(name)) is not type(value) for name, value in state.history.items()):
        raise UserError(f"{path}: its history is not as this version writes it: {start_over}")
    data_before, data = history["data"], state.history["data"]
    if data_before.get("digest") != data["digest"]:
        raise UserError(f"{path} was trained on other images ({data_before.get('images')}, digest "
                        f"{data_before.get('digest')}) than those found now ({data['images']}, digest "
                        f"{data['digest']}): {start_over}")
    edited = [name for name, digest in state.history["code"].items() if history["code"].get(name) != digest]
    if edited and not state.config.train.same_code:
        raise UserError(f"{path} was trained by other code ({', '.join(edited)} edited since): {start_over}; or say "
                        "with --same-code that it does the same")
    alpha_bar_before, alpha_bar = history["alpha_bar"], state.history["alpha_bar"]
    if alpha_bar_before.shape != alpha_bar.shape or not torch.allclose(alpha_bar_before, alpha_bar, rtol=1e-9, atol=0):
        raise UserError(f"{path} was trained with another noise schedule than diffusion.py makes now: {start_over}")
    checkpoint.load_weights(state.learner.network, saved["model"], path)
    checkpoint.load_weights(state.learner.average, saved["ema"], path)
    try:
        state.learner.optimizer.load_state_dict(saved["optimizer"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit ({error}); start over with --fresh") from None
    state.step, state.history = saved["step"], history | {"code": state.history["code"]}
    began, now = before.precision, state.config.precision
    finished = state.progress(state.config.train) >= 1
    if now != began and not finished:
        state.runtime.say(f"note: this run trained in {began} and goes on in {now}, so its weights will differ from "
                          "those of a run in one precision.")
    elif now == "bf16" and precision == "auto" and not finished and not state.runtime.bf16:
        state.runtime.say("note: this run trains in bf16, as it began, at which this device is slow: --precision fp32 "
                          "is faster here.")
    if assumed:
        state.runtime.say(f"note: {path} is older than these settings, and is continued with {', '.join(assumed)}")
    return before.train


def save(state: TrainingState) -> None:
    """Writes the checkpoint, for one process to do; raises Diverged, or WriteError if it can't be written."""
    learner = state.learner
    if not all(torch.isfinite(weight).all() for weight in learner.network.parameters()):
        raise Diverged(f"a weight is not finite after step {state.step}, so it is not saved, and {state.path} is "
                       "left as it was")
    weights = {"model": learner.network.state_dict(), "ema": learner.average.state_dict()}
    checkpoint.save(state.path, {"config": stored(state.config), "optimizer": learner.optimizer.state_dict(),
                                 "step": state.step, "history": state.history, **weights})


def read_losses(state: TrainingState) -> float | None:
    """Waits for the losses of the steps since the last call, and adds them to the history in the order of the steps.

    Returns the mean training loss since the last row of metrics.csv, if any. Raises Diverged after BAD_STEPS skipped
    steps in a row.
    """
    history = state.history
    for loss in torch.stack(state.pending_losses).tolist() if state.pending_losses else []:
        if math.isfinite(loss):
            history["running"] = [history["running"][0] + loss, history["running"][1] + 1]
            state.skipped_in_a_row = 0
        else:
            history["skipped"] += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= BAD_STEPS:
                kept = f"; {state.path} holds the weights from before" if state.path.exists() else ""
                raise Diverged(f"the loss or its gradient was not finite in {BAD_STEPS} steps in a row, up to step "
                               f"{state.step}{kept}")
    state.pending_losses.clear()
    return history["running"][0] / history["running"][1] if history["running"][1] else None
