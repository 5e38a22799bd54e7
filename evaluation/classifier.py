"""The classifier of a data set: the distances are between its features, those of the layer before the last.

The one for MNIST ships with the project. For other data one is trained by the same code, once, and kept.
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config import ROOT, UserError
from dataset import CLASSES, LabelledImages, to_unit
from support.checkpoint import read_tensors, weights_digest
from support.console import progress_bar, say
from support.files import make_folder, write_atomically

SHIPPED = ROOT / "checkpoints" / "classifier.safetensors"  # of MNIST
KEPT = Path("checkpoints") / "classifiers"  # of all other data
CONFIDENT = 0.9  # probability of its likeliest class from which the classifier is confident of an image
EPOCHS, BATCH, LR, SMOOTHING = 8, 128, 4e-3, 0.03  # of its training; smoothing of the labels makes it less confident
ROTATION, SCALE, SHIFT, SHEAR = 12.0, 0.12, 2.0, 0.15  # largest change: degrees, share, pixels, share
FEWEST = 200  # test images, by which its accuracy is measured
FEWEST_STEPS = 500  # of its training, however few the images are
AVERAGE = 0.995  # decay of its averaged weights, warmed up


class Classifier(nn.Module):
    """forward(x [B, 1, 28, 28] in [-1, 1]) -> (features [B, 64], logits [B, 10]).

    A loaded one also has `digest`, 16 hex digits that name its weights, and `meta`, how they were made.
    """

    digest: str = ""
    meta: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()

        def convolution(channels_in: int, channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

        self.body = nn.Sequential(
            *convolution(1, 16), *convolution(16, 16), nn.MaxPool2d(2),  # [B, 16, 14, 14]
            *convolution(16, 48), *convolution(48, 48), nn.MaxPool2d(2),  # [B, 48, 7, 7]
            *convolution(48, 96), *convolution(96, 96), nn.MaxPool2d(2),  # [B, 96, 3, 3]
            nn.Flatten(), nn.Linear(864, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),  # [B, 64]
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)


@torch.no_grad()
def extract(classifier: Classifier, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Features float32 [N, 64] and class probabilities [N, 10] of uint8 images [N, 1, 28, 28], all on the CPU."""
    outputs = [classifier(to_unit(chunk).to(memory_format=torch.channels_last)) for chunk in images.split(batch)]
    features, logits = (torch.cat(parts) for parts in zip(*outputs))
    return features, logits.softmax(dim=1)


def load_classifier(path: Path = SHIPPED) -> Classifier:
    """The classifier in eval mode on the CPU; raises UserError where its file is missing, damaged or something else."""
    advice = ("restore it from the repository, or train it again with benchmarks/train_classifier.py"
              if path == SHIPPED else "delete it to have it trained again")
    state, metadata = read_tensors(path, advice)
    classifier = Classifier()
    try:
        classifier.load_state_dict(state)
        digest, meta = metadata["digest"], json.loads(metadata["meta"])
    except (RuntimeError, LookupError, ValueError):
        raise UserError(f"{path}: it is no classifier of this project; {advice}") from None
    if weights_digest(state) != digest:
        raise UserError(f"{path}: the weights don't match their digest {digest}, so the file is damaged; {advice}")
    classifier.digest, classifier.meta = digest, meta
    return classifier.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def dataset_classifier(name: str, digest: str, train: LabelledImages, test: LabelledImages) -> Classifier:
    """The classifier of the data with that digest, trained once and kept; UserError below FEWEST test images."""
    path = KEPT / f"{name}-{digest}.safetensors"
    if not path.exists():
        if len(test) < FEWEST:
            raise UserError(f"--dataset {name}: it has {len(test)} test images, and the classifier that measures needs "
                            f"at least {FEWEST}; add some")
        say(f"The images of {name} need a classifier of their own: it is trained once (a few minutes for 60,000 "
            f"images) and kept in {path}.")
        classifier = train_classifier(train.images, train.labels)
        scores = score(classifier, test.images, test.labels)
        save_classifier(path, classifier, {"data": name, "torch": torch.__version__, **scores})
    classifier = load_classifier(path)
    say(f"Classifier: {path}, accuracy {classifier.meta['accuracy']:.2%} on the test images.")
    return classifier


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS) -> Classifier:
    """Trains a classifier on uint8 images [N, 1, 28, 28] and their labels [N], on the CPU."""
    torch.manual_seed(seed)
    random, size = torch.Generator().manual_seed(seed), min(BATCH, max(2, len(images) // 4))
    network = Classifier().to(memory_format=torch.channels_last)

    def average(averages: Any, weights: Any, updates: Any) -> None:
        get_ema_multi_avg_fn(min(AVERAGE, (1 + int(updates)) / (10 + int(updates))))(averages, weights, updates)

    averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    epochs = max(epochs, math.ceil(FEWEST_STEPS / (len(images) // size)))
    steps = epochs * (len(images) // size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    with progress_bar(total=steps, desc="training the classifier", unit="step", leave=False) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=random)
            for index in order[:len(order) // size * size].split(size):
                x = augment(to_unit(images[index]), random).to(memory_format=torch.channels_last)
                loss = F.cross_entropy(network(x)[1], labels[index], label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                averaged.update_parameters(network)
                bar.update()
    return cast(Classifier, averaged.module.eval())


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Images x [B, 1, 28, 28] in [-1, 1], each rotated, scaled, sheared and shifted by other random amounts."""
    angle, wide, high, shear, right, down = torch.rand(6, len(x), generator=random) * 2 - 1  # each [B]
    cos, sin = (angle * math.radians(ROTATION)).cos(), (angle * math.radians(ROTATION)).sin()
    wide, high, shift = 1 + SCALE * wide, 1 + SCALE * high, SHIFT * 2 / 28
    rows = [torch.stack([cos * wide, SHEAR * shear - sin * wide, shift * right], dim=1),
            torch.stack([sin * high, cos * high, shift * down], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)  # [B, 28, 28, 2]
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # black outside


def score(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, share of images of which it is confident, and mean negative log-likelihood in nats."""
    _, probabilities = extract(classifier, images)
    likeliest = probabilities.max(1)
    return {"accuracy": (likeliest.indices == labels).double().mean().item(),
            "confident": (likeliest.values > CONFIDENT).double().mean().item(),
            "nll": F.nll_loss(probabilities.log(), labels).item()}


def save_classifier(path: Path, classifier: Classifier, meta: dict[str, Any]) -> None:
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    data = safetensors.torch.save(state, {"digest": weights_digest(state), "meta": json.dumps(meta)})
    make_folder(path.parent)
    write_atomically(path, lambda file: file.write(data))
