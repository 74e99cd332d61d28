"""The loop over a data set."""

import pytest
import torch
from torch import nn

from neurst.core.check import state_of
from neurst.core.train import TrainConfig, train


def draw(generator):
    return torch.rand(16, 1, generator=generator)


def loss(model, x):
    return (model(x) - 3 * x + 1).square().mean()


def fresh():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def test_a_line_is_learned_and_the_history_falls():
    model = fresh()
    history = train(model, draw, loss, TrainConfig(steps=300, learning_rate=0.1, record_every=50))
    assert history["step"] == [0, 50, 100, 150, 200, 250, 299]
    assert history["loss"][-1] < 1e-3 * history["loss"][0]
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 1), 3.0), atol=0.05, rtol=0)
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_not_used():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model = fresh()
        before = torch.random.get_rng_state()
        train(model, draw, loss, TrainConfig(steps=5, random_state=seed))
        found.append(state_of(model)["weight"])
        assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_interrupted_training_leaves_the_weights():
    model = fresh()

    def stop(step, value):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, draw, loss, TrainConfig(steps=9), on_step=stop)
    assert float(model.weight.detach()) == 0


def test_a_loss_that_is_not_finite_stops_it():
    model = fresh()
    with pytest.raises(
        ValueError, match=r"the loss is nan and its gradient .* at step 0: lower `learning_rate` \(0.002\)"
    ):
        train(model, draw, lambda model, x: loss(model, x) * torch.nan, TrainConfig(steps=9))
    assert float(model.weight.detach()) == 0


def test_the_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, learning_rate=1.0, warm_up=10)
    rates = [config.rate(k) for k in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == max(rates[9:12])
    assert rates[-1] < 1e-3


def test_a_wrong_number_is_named():
    with pytest.raises(ValueError, match="`TrainConfig.steps=0`: expected a whole number >= 1"):
        TrainConfig(steps=0)
