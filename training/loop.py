"""mode train, and a training of mode experiment: the loop, and when a run is saved and logged."""

import contextlib
import time
from collections import deque
from dataclasses import replace
from statistics import median

import sample
from config import Config, Precision, UserError
from support import code, plots, selection
from support.files import WriteError, lock, make_folder
from support.loading import load_both
from support.runtime import Runtime, stop_signals
from training.log import LOG_SHARE, Display, announce, current_model, due, log_point
from training.optimizer import learning_rate
from training.state import Diverged, TrainingState, new_state, read_losses, resume, save

SAVE_SECONDS = 30.0  # between checkpoints
RETRY_SECONDS = 5.0  # after a save that failed
FAILING_SECONDS = 300.0  # in which every save failed: then the run ends
LAST_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries to save at the end of a run
READ_SECONDS = 1.0  # between reads of the losses, each of which waits for the device
SUSPENDED_SECONDS = 10.0  # a step that is longer than this,
SUSPENDED_RATIO = 20.0  # and than so many times the median, was suspended


def main(config: Config, runtime: Runtime) -> int:
    """Trains or resumes a run and samples at its end; returns the exit status, 128 + n after stop signal n."""
    config = selection.settle(config, runtime)
    code.note_edits(runtime.say)
    state = new_state(config, runtime, *load_both(config, runtime))  # before the folders: a wrong --data-dir makes none
    sample.make_request(current_model(state), config.sample, config.seed, 1)  # as at the end: errors come now
    try:
        signal_number = run_training(state, config.precision)
    except Diverged as error:
        raise UserError(f"{error}: start over with --fresh and a lower --lr, or --precision fp32") from None
    if signal_number:
        runtime.say(f"Stopped after step {state.step:,}; saved in {state.path}. Run the same command again"
                    f"{' without --fresh' * config.train.fresh} to resume.")
        return 128 + signal_number
    sampling = replace(config, mode="sample", sample=replace(config.sample, checkpoint=state.path, write=None))
    model = sample.load_checkpoint(state.path, runtime)
    request = sample.request_of(model, sampling)
    source = sample.provenance(model, request)
    if runtime.on_rank0(lambda: (state.results / "samples.npz").exists()
                        and plots.metadata_of(state.results / "sample.png") == source):
        runtime.say(f"The run {config.name} is finished ({state.effort()}, {state.path}). Sample from it with "
                    "--mode sample, extend it with a larger --epochs or --minutes, or start over with --fresh.")
        return 0
    runtime.say(f"Training is finished ({state.effort()}).")
    for path in (state.results / "loss.png", state.results / "metrics.csv", state.path):
        if path.exists():
            runtime.say(f"  {path}")
    sample.main(sampling, runtime)
    return 0


def run_training(state: TrainingState, precision: Precision, *, quiet: bool = False) -> int:
    """Starts or resumes a run, and trains it to its end; returns the number of the signal that stopped it, or 0.

    precision: what the user asked for; with "auto" a run keeps the one that it began with.
    """
    options, runtime, folder = state.config.train, state.runtime, state.path.parent
    runtime.on_rank0(lambda: [make_folder(path) and None for path in (folder, state.results)])
    with contextlib.ExitStack() as held:
        runtime.on_rank0(lambda: held.enter_context(lock(folder)))
        if options.fresh:
            runtime.on_rank0(lambda: selection.keep_old(folder, state.results))
        resumes = runtime.on_rank0(lambda: selection.run_exists(str(state.config.name)))
        before = runtime.gather(lambda: resume(state, precision))[runtime.rank] if resumes else None
        if state.progress(options) >= 1:
            return 0
        if not quiet:
            announce(state, before)
        return train(state)


def train(state: TrainingState) -> int:
    """The loop, with its saves; returns the number of the signal that stopped it, or 0 at the end of the run."""
    options, runtime = state.config.train, state.runtime
    durations: deque[float] = deque(maxlen=101)
    slow_steps = state.learner.slow_steps  # these compile: however long that takes, two equal runs train equally
    last_read, log_seconds, seconds_before = time.perf_counter(), 0.0, state.history["seconds"]
    saves, display = Saves(state), Display(state)
    with stop_signals() as stop:
        with display.bar as bar:
            while True:
                began = time.perf_counter()
                wait = options.minutes and log_seconds > LOG_SHARE * (state.history["seconds"] - seconds_before)
                progress, signal_number, save_now, read_now, wait = runtime.all_reduce_max(
                    state.progress(options), stop[0] if stop else 0, began > saves.due,
                    began - last_read > READ_SECONDS, bool(wait))
                bar.update(progress - bar.n)
                if progress >= 1 or signal_number:
                    break
                lr = learning_rate(options, state.step, progress)
                state.pending_losses.append(state.learner.step(state.step, lr))
                state.step += 1
                log_due, preview_due = due(state)
                log_now = log_due and not wait
                loss = read_losses(state) if read_now or save_now or log_now else None
                slow_steps -= 1
                if slow_steps < 0:
                    state.history["seconds"] += step_seconds(time.perf_counter() - began, durations)
                    display.steps += 1
                if read_now or save_now or log_now:
                    last_read = time.perf_counter()
                    display.show(loss, log_now)
                if log_now:
                    end = options.minutes is None and state.progress(options) >= 1
                    log_point(state, preview=end or preview_due)
                    log_seconds += time.perf_counter() - last_read
                if save_now and not state.skipped_in_a_row:
                    saves.save()
        if signal_number:
            runtime.say("Stopping: saving the run (once more quits at once).")
        read_losses(state)
        if progress >= 1 and state.history["running"][1]:
            log_point(state, preview=True)
        saves.save_at_last()
    return int(signal_number)


class Saves:
    """When a run is saved. A save that fails is a warning at first: what ails a disk or a network drive may pass."""

    def __init__(self, state: TrainingState) -> None:
        self.state, self.due = state, time.perf_counter() + SAVE_SECONDS
        self.failing_since: float | None = None

    def save(self) -> None:
        """Saves, or warns and tries again soon; raises WriteError when that has failed for FAILING_SECONDS."""
        saved = self.state.runtime.on_rank0(self._try)  # which alone decides, for all processes
        self.due = time.perf_counter() + (SAVE_SECONDS if saved else RETRY_SECONDS)

    def _try(self) -> bool:
        say, now = self.state.runtime.say, time.perf_counter()
        try:
            save(self.state)
        except WriteError as error:
            if self.failing_since is None:
                say(f"WARNING: {error}. The run goes on, and tries again every {RETRY_SECONDS:g} seconds.")
                self.failing_since = now
            if now - self.failing_since > FAILING_SECONDS:
                raise
            return False
        if self.failing_since is not None:
            say(f"The run is saved again, after step {self.state.step:,}.")
        self.failing_since = None
        return True

    def save_at_last(self) -> None:
        """Saves at the end of a run or at a stop, if need be in the last of several tries, which may raise WriteError.
        """
        def tries() -> None:
            for number, pause in enumerate(LAST_PAUSES):
                try:
                    return save(self.state)
                except WriteError as error:
                    if number == 0:
                        self.state.runtime.say(f"WARNING: {error}. Trying again for {sum(LAST_PAUSES):g} seconds.")
                    time.sleep(pause)
            save(self.state)

        self.state.runtime.on_rank0(tries)


def step_seconds(seconds: float, durations: deque[float]) -> float:
    """Training time of a step: its duration, or the median one if the process or the computer was suspended."""
    usual = median(durations) if seconds > SUSPENDED_SECONDS and durations else seconds
    durations.append(seconds)
    return usual if seconds > SUSPENDED_RATIO * usual else seconds
