"""Local neural fields beside two convolutional networks on nine pictures: training to convergence, and noise drawn once or afresh.

``NEURST_DATA=folder python benchmarks/imaging_lofi_curves.py`` writes the tables ``lofi-curves`` and ``lofi-overfitting`` of docs/benchmarks_tables.md, in about 40 minutes on one core. The learning rates of the convolutional networks and the step at which each training stops (early stopping) are those with the best score on crops of Kodak pictures.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from imaging_lofi import SIGMA, best_tv, crop, foreign, grey, nine, noisy, root, set12
from tables import write
from torch import Tensor, nn

from neurst.core.train import TrainConfig, train
from neurst.core.weight_net import UNet
from neurst.imaging import metrics
from neurst.imaging.lofi import LoFi, LoFiSpec, LoFiTraining
from neurst.imaging.lofi.net import LoFiNet
from neurst.imaging.lofi.pictures import Picture
from neurst.imaging.lofi.training import LARGEST_GRADIENT, Pairs, loss, window_batch

BUDGETS = (30, 100, 300)  # seconds of the processor
RATES = (3e-4, 1e-3, 3e-3)
PATCH, BATCH = 56, 8
CHECKS = 4  # scores during a training


class DnCNN(nn.Module):
    """Eight convolutions with 32 channels, which predict the noise."""

    def __init__(self, depth: int = 8, width: int = 32):
        super().__init__()
        sizes = [1, *[width] * (depth - 1), 1]
        layers = []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate"), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


class ResidualUNet(nn.Module):
    """A U-Net of 16 to 128 channels, which predicts the noise."""

    def __init__(self):
        super().__init__()
        self.net = UNet(1, 1, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


@dataclass
class Scores:
    """Scores of a training, by seconds: Kodak (for choices), Set12, other kinds of pictures, and the training pictures with the noise of the training or other noise."""

    seconds: list[float] = field(default_factory=list)
    rows: list[tuple[float, ...]] = field(default_factory=list)

    def best(self) -> tuple[float, ...]:
        """The row with the best score on Kodak."""
        return max(self.rows, key=lambda row: row[0])


class Data:
    """Pictures of training, validation and test."""

    def __init__(self):
        self.clean = [each.astype(np.float32) for each in nine()]
        self.fixed = [noisy(x, SIGMA, 1000 + k).astype(np.float32) for k, x in enumerate(self.clean)]
        kodak = [crop(grey(path)) for path in sorted((root() / "images/Kodak").iterdir())]
        own = [crop(x) for x in self.clean]
        self.sets = [[(noisy(x, SIGMA, k), x) for k, x in enumerate(each)] for each in (kodak, set12(), foreign())]
        self.sets.append([(crop(y), x) for y, x in zip(self.fixed, own, strict=True)])

    def score(self, restore) -> tuple[float, ...]:
        return tuple(float(np.mean([metrics.psnr(restore(y), x) for y, x in each])) for each in self.sets)


def cnn_draw(data: Data, fresh: bool):
    """Batches of patches, turned and flipped."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = lambda n: int(torch.randint(n, (), generator=generator))
        inputs, targets = [], []
        for _ in range(BATCH):
            k = pick(len(data.clean))
            top, left = (pick(n - PATCH + 1) for n in data.clean[k].shape)
            turns, flip = pick(4), pick(2)
            for out, source in ((targets, data.clean), (inputs, data.fixed)):
                patch = torch.rot90(torch.from_numpy(source[k][top : top + PATCH, left : left + PATCH]), turns)
                out.append(patch.flip(0) if flip else patch)
        target = torch.stack(targets)[:, None]
        drawn = target + SIGMA * torch.randn(target.shape, generator=generator)
        return (drawn if fresh else torch.stack(inputs)[:, None]), target

    return draw


def lofi_parts(data: Data, fresh: bool):
    """Model, batches, loss and restoration of a local neural field."""
    torch.manual_seed(0)
    spec, config = LoFiSpec(), LoFiTraining()
    net = LoFiNet(spec)
    as_pictures = lambda each: [Picture.of("picture", x) for x in each]
    targets = as_pictures(data.clean)
    pairs = Pairs(targets if fresh else as_pictures(data.fixed), targets, None, 1)
    level = (SIGMA, SIGMA) if fresh else SIGMA
    draw = lambda generator: window_batch(pairs, level, net.margin(), spec, config, generator)
    return nn.ModuleDict({"net": net}), draw, loss, lambda y: LoFi(net)(y, sigma=SIGMA)


def cnn_parts(kind: type, data: Data, fresh: bool):
    """The same of a convolutional network."""
    torch.manual_seed(0)
    net = kind()

    def restore(y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net(torch.from_numpy(y.astype(np.float32))[None, None])[0, 0].numpy()

    return net, cnn_draw(data, fresh), lambda model, batch: (model(batch[0]) - batch[1]).abs().mean(), restore


def run(parts, data: Data, seconds: float, config: TrainConfig) -> Scores:
    """Scores along a training that takes so many seconds, scoring not counted."""
    model, draw, loss_of, restore = parts
    begin = time.process_time()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, draw, loss_of, replace(config, steps=30))
    steps = max(100, int(30 * seconds / (time.process_time() - begin)))
    model.load_state_dict(before)
    marks = {int(steps * share) - 1 for share in np.linspace(0, 1, CHECKS + 1)[1:]}
    scores, spent, since = Scores(), [0.0], [time.process_time()]

    def on_step(step: int, value: float) -> None:
        if step in marks:
            spent[0] += time.process_time() - since[0]
            for each in model.parameters():
                each.requires_grad_(False)
            scores.rows.append(data.score(restore))
            for each in model.parameters():
                each.requires_grad_(True)
            scores.seconds.append(spent[0])
            since[0] = time.process_time()

    train(model, draw, loss_of, replace(config, steps=steps), on_step=on_step)
    return scores


def main() -> None:
    torch.set_num_threads(1)
    data = Data()
    kinds = {"LoFi": None, "DnCNN, 8 x 32": DnCNN, "U-Net, 16 to 128": ResidualUNet}
    lines, curves = [], []
    for name, kind in kinds.items():
        make = lambda fresh, kind=kind: lofi_parts(data, fresh) if kind is None else cnn_parts(kind, data, fresh)
        config = TrainConfig(learning_rate=4e-3, warm_up=50, max_gradient_norm=LARGEST_GRADIENT, device="cpu")
        if kind is not None:
            trials = {}
            for rate in RATES:
                trials[rate] = run(make(True), data, BUDGETS[0], replace(config, learning_rate=rate)).best()[0]
                print(name, rate, f"{trials[rate]:.2f}", flush=True)
            config = replace(config, learning_rate=max(trials, key=trials.get))
        size = sum(weight.numel() for weight in make(True)[0].parameters())
        best = -np.inf
        for seconds in BUDGETS:
            found = run(make(True), data, seconds, config).best()
            if found[0] < best:  # a rate that is right for a short training may diverge in a long one
                config = replace(config, learning_rate=config.learning_rate / 3)
                found = run(make(True), data, seconds, config).best()
            best = found[0]
            lines.append(
                f"| {name} | {size:,} | {config.learning_rate:g} | {seconds} | {found[1]:.2f} | {found[2]:.2f} | {found[0]:.2f} |"
            )
            print(lines[-1], flush=True)
        for fresh in (True, False):
            scores = run(make(fresh), data, BUDGETS[1], config)
            kept = scores.rows
            label = "afresh" if fresh else "once"
            curves.append(f"| {name} | {label} | " + " | ".join(f"{row[1]:.2f} / {row[3]:.2f}" for row in kept) + " |")
            print(curves[-1], flush=True)
    total = (
        f"total variation with the best weight of each picture has {best_tv(set12()):.2f} and {best_tv(foreign()):.2f}"
    )
    write(
        "lofi-curves",
        __file__,
        f"Nine training pictures, noise of {SIGMA} drawn afresh in each step: mean PSNR on crops of Set12 and of other kinds of pictures after trainings of other lengths (each with its own schedule, stopped where Kodak is best, and repeated at a third of the learning rate if it diverged); {total}. One seed.",
        [
            "| network | weights | learning rate | s | Set12 | other kinds | Kodak, for choices |",
            "|---" * 7 + "|",
            *lines,
        ],
    )
    at = [f"{share * BUDGETS[1]:.0f} s" for share in (0.25, 0.5, 0.75, 1.0)]
    write(
        "lofi-overfitting",
        __file__,
        f"Noise of the nine training pictures drawn once or afresh: PSNR on Set12 / on crops of the training pictures with the noise that was drawn once, along a training of {BUDGETS[1]} s.",
        ["| network | noise | " + " | ".join(at) + " |", "|---" * (2 + len(at)) + "|", *curves],
    )


if __name__ == "__main__":
    main()
