r"""What one gradient of isotropic TV costs: jets against other ways to differentiate a coordinate network.

``python benchmarks/derivatives.py`` checks that all routes agree, times them, and writes the table of docs/benchmarks_tables.md.
The yardstick is the same arithmetic written by hand: products with the weight matrices, sines and cosines, and torch's own
backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tables import write
from torch import Tensor
from torch.func import jvp

from neurst.core.jet import jacobian, seed
from neurst.core.nets import Siren

POINTS, WIDTH, DEPTH, CHANNELS, REPEATS = 2000, 256, 3, 64, 15

generator = torch.Generator().manual_seed(0)
net = Siren(width=WIDTH, depth=DEPTH).build(2, CHANNELS, generator)
x = 2 * torch.rand(POINTS, 2, generator=generator) - 1
weights = list(net.parameters())
axes = torch.eye(2)
ones = torch.ones(2 * POINTS, WIDTH)


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value (N, C) and both tangents (2, N, C) of the sine network, written out."""
    h, tangents = x, axes[:, None, :].expand(2, len(x), 2)
    for layer in net[:-1]:
        weight = layer.omega * layer.linear.weight
        a = torch.addmm(layer.omega * layer.linear.bias, h, weight.T)
        h, tangents = torch.sin(a), torch.cos(a) * (tangents @ weight.T)
    last = net[-1]
    return torch.addmm(last.bias, h, last.weight.T), tangents @ last.weight.T


def by_jet(x: Tensor) -> tuple[Tensor, Tensor]:
    jet = net(seed(x))
    return jet.value, jet.derivative(1)


def by_jvp(x: Tensor) -> tuple[Tensor, Tensor]:
    routes = [jvp(net, (x,), (v.expand_as(x).contiguous(),)) for v in axes]
    return routes[0][0], torch.stack([tangent for _, tangent in routes])


def by_reverse(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = net(x)
    rows = [torch.autograd.grad(channel.sum(), x, create_graph=True)[0] for channel in value.unbind(1)]
    return value, torch.stack(rows).permute(2, 1, 0)


def gradient(route) -> list[Tensor]:
    """Gradient of isotropic TV with respect to the weights; the last bias has none."""
    _, tangents = route(x)
    return torch.autograd.grad(torch.linalg.vector_norm(tangents, dim=0).sum(1).mean(), weights[:-1])


def products_only() -> None:
    """The matrix products of `by_hand` and its backward pass, without anything between them."""
    for matrix in (p.detach() for p in weights if p.ndim == 2):
        for n in (POINTS, 2 * POINTS):  # value, tangents
            h, slope = ones[:n, : matrix.shape[1]], ones[:n, : matrix.shape[0]]
            _ = h @ matrix.T, slope @ matrix, slope.T @ h


def best(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least milliseconds of each run over several rounds, in turn so that a busy moment meets them all, after a warm-up."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: min(found[1:]) for name, found in times.items()}


def check_agreement() -> None:
    value, tangents = by_jet(x)
    reference = gradient(by_jet)
    torch.testing.assert_close(jacobian(net, x), tangents.permute(1, 2, 0))
    for route in (by_hand, by_jvp, by_reverse):
        other, others = route(x)
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(others, tangents, rtol=1e-4, atol=1e-4)
        for found, expected in zip(gradient(route), reference, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def main() -> None:
    check_agreement()
    ms = best(
        {
            "matrix products alone": products_only,
            "written by hand": lambda: gradient(by_hand),
            "jet": lambda: gradient(by_jet),
            "two `torch.func.jvp`": lambda: gradient(by_jvp),
        },
        REPEATS,
    )
    ms |= best({"reverse mode per channel": lambda: gradient(by_reverse)}, 1)
    hand, jets, jvps, reverse = list(ms.values())[1:]
    lines = ["| route | ms | by hand = 1 |", "|---|---|---|"]
    for name, found in ms.items():
        print(f"{name:26s} {found:8.1f} ms {found / hand:6.2f}")
        lines.append(f"| {name} | {found:.1f} | {found / hand:.2f} |")
    assert jets <= 1.3 * hand, "jets cost more than 1.3 times the same arithmetic by hand"
    assert jets < jvps, "two jvps are faster than a jet"
    assert reverse >= 10 * jets, "reverse mode per channel is less than 10 times slower than a jet"
    setting = f"One gradient of isotropic TV: {POINTS:,} points in 2-d, sine network {DEPTH} x {WIDTH}, {CHANNELS} channels, float32."
    write("derivatives", __file__, setting, lines)


if __name__ == "__main__":
    main()
