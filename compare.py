"""mode compare: did a change help? Two sides draw the same seeds and labels, and every measure gets a verdict.

A side is one network or several trainings of one recipe. One network a side can only tell these two networks apart;
whether a recipe is better takes several trainings of each, since trainings differ by luck.
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

import config as configs
import dataset
from config import CLASSES, RESERVED, Config, UserError
from drawing import Order, Trained, draw, guided, load_trained, origin
from support import checkpoint, plots
from support.files import make_folder, write_atomically
from support.runtime import Clock, Runtime, to_uint8
from support.statistics import aligned
from verdict import FEWEST_RUNS, HEADLINE, SPREAD, Verdict, smallest_shown, verdicts
from yardstick import FEWEST_BLOCKS, Row, Yardstick, judge

SHOWN = 12  # pairs of digits in compare.png
ALIKE = 0.1  # relative difference in images seen, or in time, from which it is called out


@dataclass(frozen=True)
class Side:
    """What stands on one side: how it was named, and each of its networks with the order that it draws."""

    name: str
    trained: list[Trained]
    orders: list[Order]


def run(config: Config, runtime: Runtime) -> None:
    """Draws both sides, measures them alike, and says of each measure whether b is better than a."""
    clock = Clock(runtime)
    if config.evaluate.runs is None:
        raise UserError("--mode compare: it needs two sides; add --runs A B, such as --runs pretrained mine")
    count = config.sample.num_images or 10_000
    fewest = 100 * FEWEST_BLOCKS
    if count < fewest:
        raise UserError(f"--num-images {count}: an interval takes at least {fewest:,} images; draw more")
    a, b = sides = [load_side(text, config, count, runtime) for text in config.evaluate.runs]
    data = require_comparable(sides)
    if config.dataset == "auto" and data.get("name") in (*dataset.SOURCES, "generated"):
        config = replace(config, dataset=data["name"])
    config = dataset.resolve(config, runtime)
    train, test = (dataset.load_shared(config, split, runtime) for split in ("train", "test"))
    if data.get("digest") != dataset.describe(train, "")["digest"]:
        raise UserError(f"--dataset {config.dataset}: the runs were trained on other images ({data.get('name')}); name "
                        "the data set that they were trained on")
    folder = make_folder(Path("results") / configs.run_name(config))
    for line in differences(a, b):
        runtime.say(line)
    clock.lap("load")
    made: list[Yardstick] = []
    if int((train.labels != train.labels[0]).sum()) == 0:
        raise UserError(f"--dataset {config.dataset}: all images are of one class, and what decides is judged by a "
                        "classifier of classes; look at --mode evaluate instead")
    labels = a.orders[0].labels
    runtime.only_first(lambda: made.append(Yardstick(train, test, labels, judge(config, train, test, labels))))
    clock.lap("look at real images")
    rows: list[list[Row]] = [[], []]
    pictures: list[Tensor] = []
    for side, measured in zip(sides, rows):
        for number, (trained, order) in enumerate(zip(side.trained, side.orders)):
            images = to_uint8(draw(trained, order, runtime, progress=True))
            if number == 0:
                pictures.append(images)
            if runtime.first:
                measured.append(made[0].measure(images, order.labels, neighbours=number == 0))
    clock.lap("draw and measure")
    if runtime.first:
        found = verdicts(rows[0], rows[1], made[0].floor, len(made[0].sets))
        print(table(found, made[0].floor, count))
        print(conclusion(a, b, rows, found))
        write(folder, sides, rows, found, pictures)
        print(f"  {folder / 'compare.json'}\n  {folder / 'compare.png'}")
    runtime.barrier()
    runtime.say(clock)


def load_side(text: str, config: Config, count: int, runtime: Runtime) -> Side:
    """A side such as `mine`, `mine,mine-s1`, `path/to/last.safetensors` or `pretrained --guidance 1.3`."""
    try:
        names, *flags = shlex.split(text) or [""]
    except ValueError as error:
        raise UserError(f"--runs {text}: its quotes don't match ({error}); write such as \"mine --steps 25\"") from None
    own = configs.parse(flags, config)
    fixed = {field: getattr(config.sample, field) for field in ("num_images", "digits", "write", "checkpoint")}
    if replace(own, sample=config.sample) != config or replace(own.sample, **fixed) != own.sample:
        raise UserError(f"--runs '{text}': only how it is drawn can be a side's own (--sampler, --steps, --spacing, "
                        "--eta, --variance, --guidance, --guidance-interval); give other flags for both, outside the "
                        "quotes")
    trained, orders = [], []
    for name in names.split(","):
        found = load_trained(replace(own, sample=replace(own.sample, checkpoint=checkpoint_of(name, text))), runtime)
        options = guided(own.sample, found, runtime)
        trained.append(found)
        orders.append(Order(options, config.seed, range(count), found.labels(options.digits, config.seed, count)))
    if len({found.digest for found in trained}) < len(trained):
        raise UserError(f"--runs '{text}': the same weights twice are not two trainings; name each run once")
    if any(int(order.labels.max()) >= CLASSES for order in orders):
        raise UserError(f"--runs '{text}': it draws without labels, and what decides is the distance within classes; "
                        "leave out --digits none, and networks of --label-dropout 1")
    return Side(text, trained, orders)


def checkpoint_of(name: str, side: str) -> Path:
    if name == RESERVED:
        return checkpoint.PRETRAINED
    own = Path("checkpoints") / name / checkpoint.LAST
    path = Path(name) if Path(name).suffix in (".safetensors", ".pt") else own
    if not path.is_file():
        raise UserError(f"--runs '{side}': there is no {path}; name a run in checkpoints/, a file, or {RESERVED}")
    return path


def require_comparable(sides: list[Side]) -> dict[str, Any]:
    """What is known of the images that all were trained on; raises UserError where these are not the same."""
    everything = [(side, trained) for side in sides for trained in side.trained]
    side, first = everything[0]
    for other, trained in everything[1:]:
        if trained.data.get("digest") != first.data.get("digest"):
            names = f"{first.data.get('name')} and {trained.data.get('name')}"
            raise UserError(f"--runs: '{side.name}' and '{other.name}' were trained on other images ({names}), so "
                            "nothing they draw compares; name runs of one data set")
    return first.data


def differences(a: Side, b: Side) -> list[str]:
    """In which settings, code and effort the sides differ, a line each."""
    one, other = a.trained[0], b.trained[0]
    settings = configs.differences(one.config, other.config)
    ours, theirs = (dataclasses.asdict(side.orders[0].options) for side in (a, b))
    drawing = [f"{name} is {ours[name]}, and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    code = [trained.history.get("code", {}) for trained in (one, other)]
    files = [name for name in {**code[0], **code[1]} if code[0].get(name) != code[1].get(name)]
    lines = []
    for letter, side in (("a", a), ("b", b)):
        many = f"{len(side.trained)} trainings of " if len(side.trained) > 1 else ""
        images, seconds = effort(side)
        lines.append(f"{letter}: {side.name} ({many}{images:,.0f} images, {seconds / 60:.1f} minutes)")
    lines.append(f"Settings in which they differ, a's and b's: {'; '.join(settings + drawing) or 'none'}.")
    if files:
        lines.append(f"Code in which they differ: {', '.join(files) if all(code) else 'not recorded for one of them'}.")
    for what, own, its in zip(("see as many images", "train for as long"), effort(a), effort(b)):
        ratio = its / max(own, 1e-9)
        if abs(ratio - 1) > ALIKE and one.digest != other.digest:
            lines.append(f"note: they did not {what}: b has {ratio:.2f} times a's.")
    return lines


def effort(side: Side) -> tuple[float, float]:
    """Images seen and seconds of a training."""
    return (fmean(trained.step * trained.config.train.batch_size for trained in side.trained),
            fmean(trained.history.get("seconds", 0.0) for trained in side.trained))


def table(found: list[Verdict], floor: Row, count: int) -> str:
    """Each measure's values, the difference with its 95% interval, and the verdict."""
    lines = [[f"N = {count:,}", "a", "b", "b - a", "95% interval", "real", ""]]
    for verdict in found:
        m = verdict.measure
        show = m.form.format
        change = m.form.replace(":", ":+").format
        ends = [change(end) for end in (verdict.low, verdict.high) if end is not None]
        real = show(floor.values[m.key]) if m.key in floor.values else ""
        name = f"{m.heading} (decides)" if m.key == HEADLINE else m.heading
        lines.append([name, show(verdict.a), show(verdict.b), change(verdict.b - verdict.a), " to ".join(ends), real,
                      verdict.word])
    return aligned(lines)


def conclusion(a: Side, b: Side, rows: list[list[Row]], found: list[Verdict]) -> str:
    """The verdict in words, and what it can't say."""
    headline = next(verdict for verdict in found if verdict.measure.key == HEADLINE)
    change = f"{headline.b / headline.a - 1:+.1%}"
    judged = f"b is {headline.word}" if headline.word in ("better", "worse") else headline.word
    said = [f"Distance within classes, which decides: {change}; {judged}. The other verdicts are corrected for their "
            "number (Holm)."]
    spread = f"{SPREAD[HEADLINE]:.0%}"
    if len(a.trained) == len(b.trained) == 1:
        if a.trained[0].digest == b.trained[0].digest:
            said.append("Both sides are the same network, drawn in two ways.")
        else:
            said.append("This is about these two networks, not about their recipes: trainings of one recipe that "
                        f"differ by their seed alone differ by {spread} (standard deviation, after five minutes of "
                        "one thread). Train three a side to compare recipes.")
        return "\n".join(said)
    if min(len(a.trained), len(b.trained)) < FEWEST_RUNS:
        said.append(f"With fewer than {FEWEST_RUNS} trainings on a side, the spread between them is taken as "
                    f"known, {spread}: measured once, over 8 trainings of an earlier default.")
    smallest = smallest_shown(rows[0], rows[1])
    said.append(f"So many trainings call observed differences of {smallest:.0%} or more.")
    return "\n".join(said)


def write(folder: Path, sides: list[Side], rows: list[list[Row]], found: list[Verdict], pictures: list[Tensor]) -> None:
    """compare.json and compare.png: the same seeds side by side, where they differ most first, and the intervals."""
    def networks(side: Side, measured: list[Row]) -> list[dict[str, Any]]:
        return [{**origin(trained, order), "values": row.values, "errors": row.errors}
                for trained, order, row in zip(side.trained, side.orders, measured)]

    report = {"sides": [{"name": side.name, "networks": networks(side, own)} for side, own in zip(sides, rows)],
              "verdicts": {v.measure.key: {"a": v.a, "b": v.b, "interval": [v.low, v.high], "p": v.p, "verdict": v.word}
                           for v in found}}
    write_atomically(folder / "compare.json", lambda file: file.write(json.dumps(report, indent=1).encode()))
    apart = (pictures[0].float() - pictures[1].float()).square().flatten(1).sum(1)
    first = apart.argsort(descending=True)[:SHOWN]
    intervals = [(v.measure.heading, v.a, v.b, v.low, v.high, v.word) for v in found]
    names = sides[0].name, sides[1].name
    plots.save_comparison(folder / "compare.png", (pictures[0][first], pictures[1][first]), names, intervals,
                          {"a": names[0], "b": names[1]})
