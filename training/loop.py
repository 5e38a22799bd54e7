"""mode train: the loop, and when a run is saved and logged. The step itself is in training/step.py."""

import contextlib
import time
from collections import deque
from dataclasses import replace
from statistics import median

from tqdm import tqdm

import sample
from config import Config, UserError
from support import selection
from support.files import lock, make_folder
from support.loading import load_both
from support.runtime import Runtime, stop_signals
from training.log import announce, current_model, is_written, log_number, log_point, preview_number
from training.optimizer import learning_rate, run_length
from training.state import TrainingState, new_state, read_losses, resume, save

SAVE_SECONDS = 30.0  # between checkpoints
READ_SECONDS = 1.0  # between reads of the losses, each of which waits for the device
SUSPENDED_SECONDS = 10.0  # a step that is longer than this,
SUSPENDED_RATIO = 20.0  # and than so many times the median, was suspended


def main(config: Config, runtime: Runtime) -> int:
    """Trains or resumes a run and samples at its end; returns the exit status, 128 + n after stop signal n."""
    if config.train.batch_size < runtime.world:
        raise UserError(f"--batch-size {config.train.batch_size}: fewer images than the {runtime.world} processes; "
                        "raise it, or start fewer")
    config = selection.settle(config, runtime)
    state = new_state(config, runtime, *load_both(config, runtime))  # before the folders: a wrong --data-dir makes none
    sample.make_request(current_model(state), config.sample, config.seed, 1)  # as at the end: errors come now
    folder, results = state.path.parent, state.results
    sampling = replace(config, mode="sample", sample=replace(config.sample, checkpoint=state.path, write=None))
    runtime.on_rank0(lambda: [make_folder(f) and None for f in (folder, results)])
    with contextlib.ExitStack() as held:
        runtime.on_rank0(lambda: held.enter_context(lock(folder)))
        if config.train.fresh:
            runtime.on_rank0(lambda: selection.keep_old(folder, results))
        resumes = runtime.on_rank0(lambda: selection.run_exists(str(config.name)))
        before = runtime.gather(lambda: resume(state, config.precision))[runtime.rank] if resumes else None
        if before is not None and state.progress(config.train) >= 1:
            model = sample.load_checkpoint(state.path, runtime)
            request = sample.request_of(model, sampling)
            if runtime.on_rank0(lambda: is_written(results, model, request)):
                runtime.say(f"The run {config.name} is finished ({state.effort()}, {state.path}). Sample from it with "
                            "--mode sample, extend it with a larger --epochs or --minutes, or start over with --fresh.")
                return 0
        else:
            announce(state, before)
            if signal_number := train(state):
                runtime.say(f"Stopped after step {state.step:,}; saved in {state.path}. Run the same command again"
                            f"{' without --fresh' * config.train.fresh} to resume.")
                return 128 + signal_number
    runtime.say(f"Training is finished ({state.effort()}).")
    for path in (results / "loss.png", results / "metrics.csv", state.path):
        if path.exists():
            runtime.say(f"  {path}")
    sample.main(sampling, runtime)
    return 0


def train(state: TrainingState) -> int:
    """The loop, with its saves; returns the number of the signal that stopped it, or 0 at the end of the run."""
    options, runtime = state.config.train, state.runtime
    durations: deque[float] = deque(maxlen=101)
    slow_steps = state.learner.slow_steps  # these compile: however long that takes, two equal runs train equally
    last_save = last_read = time.perf_counter()
    bar = tqdm(total=run_length(options, len(state.train)) if options.minutes is None else None, initial=state.step,
               unit="img", unit_scale=options.batch_size, disable=runtime.rank != 0, dynamic_ncols=True,
               mininterval=0.5, smoothing=0.05)
    with stop_signals() as stop, bar:
        while True:
            began = time.perf_counter()
            progress, signal_number, save_now, read_now = runtime.all_reduce_max(
                state.progress(options), stop[0] if stop else 0, began - last_save > SAVE_SECONDS,
                began - last_read > READ_SECONDS)
            if progress >= 1 or signal_number:
                break
            if options.minutes is not None and progress > 0.01:
                bar.total = round(state.step / progress)  # for the time remaining
            state.pending_losses.append(state.learner.step(state.step, learning_rate(options, state.step, progress)))
            state.step += 1
            bar.update()
            now, before = state.epoch(state.step), state.epoch(state.step - 1)
            log_now = log_number(now) != log_number(before)
            if read_now or save_now or log_now:
                if (loss := read_losses(state)) is not None:
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                last_read = time.perf_counter()
            slow_steps -= 1
            if slow_steps < 0:
                state.history["seconds"] += step_seconds(time.perf_counter() - began, durations)
            if log_now:
                end = options.minutes is None and state.progress(options) >= 1
                log_point(state, preview=end or preview_number(now) != preview_number(before))
            if save_now and not state.skipped_in_a_row:
                runtime.on_rank0(lambda: save(state))
                last_save = time.perf_counter()
        if signal_number:
            runtime.say("\nStopping: saving the run (once more quits at once).")
        read_losses(state)
        if progress >= 1 and state.history["running"][1]:
            log_point(state, preview=True)
        runtime.on_rank0(lambda: save(state))
    return int(signal_number)


def step_seconds(seconds: float, durations: deque[float]) -> float:
    """Training time of a step: its duration, or the median one if the process or the computer was suspended."""
    usual = median(durations) if seconds > SUSPENDED_SECONDS and durations else seconds
    durations.append(seconds)
    return usual if seconds > SUSPENDED_RATIO * usual else seconds
