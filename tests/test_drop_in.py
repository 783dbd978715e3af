"""Models as people write them: converted, they train to the same losses as before.

In float64, so that nothing but a wrong gradient tells the two apart. The models change results in
place, freeze parameters, share them, differentiate gradients, and take up a layer more than once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import torchbp

TF = torch.nn.functional


class Model(nn.Module):
    """A model with its loss on random data."""

    def loss(self) -> Tensor:
        raise NotImplementedError


def classes(n: int, count: int) -> Tensor:
    return torch.randint(count, (n,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, length, size = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, size // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        scores /= math.sqrt(size // 2)
        scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(8), Attention())
        self.mlp = nn.Sequential(
            nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        y += x
        z = self.mlp(y)
        z += y
        return z  # type: ignore[no-any-return]


class LanguageModel(Model):
    """A transformer whose residuals are added in place, and whose last weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.head.weight = self.embedding.weight
        self.criterion = nn.CrossEntropyLoss()

    def loss(self) -> Tensor:
        tokens = torch.randint(11, (3, 6))
        logits = self.head(self.blocks(self.embedding(tokens[:, :-1])))
        return self.criterion(logits.flatten(0, 1), tokens[:, 1:].flatten())  # type: ignore[no-any-return]


class Checkpointed(Model):
    """Blocks that run once more in the backward pass; losses weighted in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 2)
        self.criterion = nn.CrossEntropyLoss(reduction="none")

    def loss(self) -> Tensor:
        x = torch.randn(2, 5, 8)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        losses = self.criterion(self.head(x[:, 0]), torch.tensor([0, 1]))
        losses *= torch.tensor([1.0, 2.0])
        return losses.mean()  # type: ignore[no-any-return]


class Recurrent(Model):
    """A GRU cell by hand, its gates squashed in place; every step uses the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(5, 12), nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def loss(self) -> Tensor:
        x, h = torch.randn(3, 4, 5), torch.zeros(3, 4)
        for t in range(4):
            (a, b, c), (d, e, f) = self.of_input(x[:, t]).chunk(3, 1), self.of_state(h).chunk(3, 1)
            update, reset = (a + d).sigmoid_(), (b + e).sigmoid_()
            h = (1 - update) * torch.tanh(c + reset * f) + update * h
        return TF.cross_entropy(self.head(h), classes(3, 3))


class Flow(Model):
    """RealNVP: halves of a result are scaled and shifted, in place, by those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)) for _ in range(3)
        )

    def loss(self) -> Tensor:
        x, volume = torch.randn(8, 4), torch.zeros(8)
        for net in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = net(a).chunk(2, 1)
            b = b * scale.exp()
            b += shift
            volume += scale.sum(1)
            x = torch.cat([b, a], 1)
        return (x.square().sum(1) / 2 - volume).mean()


class Autoencoder(Model):
    """A variational one, its noise scaled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.01, True), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid())

    def loss(self) -> Tensor:
        x = torch.rand(8, 6)
        mean, log_variance = self.encoder(x).chunk(2, 1)
        deviation = log_variance.mul(0.5).exp_()
        z = torch.randn_like(deviation).mul_(deviation).add_(mean)
        information = 1 + log_variance - mean.square() - log_variance.exp()
        return TF.binary_cross_entropy(self.decoder(z), x) - information.mean() / 2


class ActorCritic(Model):
    """DDPG: the actor learns through a critic that is frozen meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def loss(self) -> Tensor:
        x = torch.randn(8, 4)
        self.critic.requires_grad_(False)
        value = self.critic(torch.cat([x, self.actor(x)], 1)).mean()
        self.critic.requires_grad_(True)
        return self.critic(torch.randn(8, 6)).square().mean() - value  # type: ignore[no-any-return]


class LowRank(Model):
    """LoRA: what a frozen layer makes, and an update of low rank added to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def loss(self) -> Tensor:
        x = torch.randn(8, 6)
        y = self.frozen(x)
        y += self.up(self.down(x))
        return TF.cross_entropy(self.head(y.relu_()), classes(8, 3))


class Critic(Model):
    """WGAN-GP: a penalty on the gradient with respect to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(True), nn.Linear(8, 2))
        self.critic = nn.Sequential(
            nn.Linear(2, 8), nn.LeakyReLU(0.2, True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )

    def loss(self) -> Tensor:
        fake, real, u = self.generator(torch.randn(8, 3)), torch.randn(8, 2), torch.rand(8, 1)
        mixed = (u * real + (1 - u) * fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        loss: Tensor = self.critic(fake.detach()).mean() - self.critic(real).mean() + penalty
        return loss - 0.1 * self.critic(fake).mean()  # type: ignore[no-any-return]


class Forces(Model):
    """A potential that is fitted by its slope, and Burgers' equation, with a second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )

    def loss(self) -> Tensor:
        x = torch.randn(8, 2, requires_grad=True)
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        residual = slope[:, 1] + u.squeeze(1) * slope[:, 0] - 0.1 * bend[:, 0]
        return residual.square().mean() + (slope - torch.randn(8, 2)).square().mean()


class Meta(Model):
    """MAML: through two steps of gradient descent."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

    def loss(self) -> Tensor:
        x, y = torch.randn(8, 1), torch.randn(8, 1)
        parameters: dict[str, Tensor] = dict(self.net.named_parameters())
        for _ in range(2):
            loss = TF.mse_loss(functional_call(self.net, parameters, (x,)), y)
            grads = torch.autograd.grad(loss, [*parameters.values()], create_graph=True)
            steps = zip(parameters.items(), grads, strict=True)
            parameters = {name: p - 0.1 * grad for (name, p), grad in steps}
        return TF.mse_loss(functional_call(self.net, parameters, (x,)), y)


class Mixer(Model):
    """Layers along either dimension, a transposed result changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(5, 8), nn.ELU(inplace=True), nn.Linear(8, 5))
        self.channels = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 6))
        self.head, self.criterion = nn.Linear(6, 3), nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss(self) -> Tensor:
        x = torch.randn(4, 5, 6)
        x = x + self.tokens(x.mT).mT
        y = self.channels(x)
        y.mT.add_(x.mT)
        return self.criterion(self.head(y.mean(1)), classes(4, 3))  # type: ignore[no-any-return]


class Accumulated(Model):
    """Losses divided and added in place; a row of a result overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.criterion = nn.CrossEntropyLoss()

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for _ in range(3):
            y = self.body(torch.randn(5, 4))
            y[0] = 0
            loss = self.criterion(self.head(torch.tanh(y)), classes(5, 3))
            loss /= 3
            total += loss
        return total


MODELS = [
    LanguageModel, Checkpointed, Recurrent, Flow, Autoencoder, ActorCritic, LowRank, Critic, Forces,
    Meta, Mixer, Accumulated,
]  # fmt: skip


def losses(kind: type[Model], convert: bool) -> list[float]:
    torch.manual_seed(0)
    model: Any = kind()
    if convert:
        model = torchbp.convert(model)
        assert any(type(m).__module__.startswith("torchbp.") for m in model.modules())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore:convert left alone")
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_converted_model_trains_the_same(kind: type[Model]) -> None:
    # Sums in another order, through four steps of Adam, which divides by small numbers.
    assert losses(kind, True) == pytest.approx(losses(kind, False), rel=1e-9)
