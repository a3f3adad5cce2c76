"""Deep deterministic policy gradient: an actor and a critic of two small layers each, learning from whole episodes.

In numpy, with the gradients written out: at 64 units a framework's overhead per operation is most of the time, and sums
on one thread are the same for any number of cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Agent", "Settings"]


@dataclass(frozen=True)
class Settings:
    """hidden: units per layer; batch, replay: transitions in a step and in memory; actor_rate, critic_rate: of Adam;
    average: share of the new parameters in those of the targets; bootstrap: how much of a step's target is the critic's
    own value of the next state, the rest being the episode's reward; pull: price of the square of what goes into the
    actor's sigmoid, from whose ends no gradient leads back.
    """

    hidden: int = 64
    batch: int = 64
    replay: int = 2000
    actor_rate: float = 1e-3
    critic_rate: float = 3e-3
    average: float = 0.02
    bootstrap: float = 0.5
    pull: float = 0.005


class Network:
    """inputs -> hidden -> hidden -> outputs, rectified between; the parameters are one vector, so that an update is
    one.
    """

    def __init__(self, rng: np.random.Generator, inputs: int, hidden: int, outputs: int) -> None:
        shapes = [(inputs, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, outputs), (outputs,)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.values, self.gradient = np.zeros(sum(sizes)), np.zeros(sum(sizes))
        ends = np.cumsum(sizes)[:-1]
        self.parts = [a.reshape(s) for a, s in zip(np.split(self.values, ends), shapes, strict=True)]
        self.slopes = [a.reshape(s) for a, s in zip(np.split(self.gradient, ends), shapes, strict=True)]
        for weight, scale in zip(self.parts[::2], (2.0**0.5, 2.0**0.5, 0.1), strict=True):
            weight[:] = rng.standard_normal(weight.shape) * scale / len(weight) ** 0.5
        self._mean, self._square, self._steps = np.zeros_like(self.values), np.zeros_like(self.values), 0
        self._seen: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Outputs (n, outputs) of inputs (n, inputs), which `backward` then speaks of."""
        a, b, c, d, e, f = self.parts
        first = np.maximum(x @ a + b, 0.0)
        second = np.maximum(first @ c + d, 0.0)
        self._seen = x, first, second
        return second @ e + f

    def backward(self, slope: np.ndarray) -> np.ndarray:
        """Gradient to the inputs (n, inputs), from that to the outputs (n, outputs); `descend` has that to the
        parameters.
        """
        assert self._seen is not None
        x, first, second = self._seen
        a, _, c, _, e, _ = self.parts
        for i, (inputs, weight) in enumerate(((second, e), (first, c), (x, a))):
            self.slopes[4 - 2 * i][:] = inputs.T @ slope
            self.slopes[5 - 2 * i][:] = slope.sum(axis=0)
            slope = slope @ weight.T
            if i < 2:
                slope = slope * (inputs > 0.0)
        return slope

    def descend(self, rate: float) -> None:
        """A step of Adam (arXiv 1412.6980) against the gradient."""
        self._steps += 1
        self._mean += 0.1 * (self.gradient - self._mean)
        self._square += 0.001 * (self.gradient**2 - self._square)
        mean, square = self._mean / (1.0 - 0.9**self._steps), self._square / (1.0 - 0.999**self._steps)
        self.values -= rate * mean / (np.sqrt(square) + 1e-8)

    def approach(self, other: Network, share: float) -> None:
        self.values += share * (other.values - self.values)


class Agent:
    """Actor μ(s) in [0, 1]^a and critic Q(s, a), with slowly moving targets μ', Q' and a replay of transitions.

    The reward R of an episode comes at its end and is undiscounted. A transition's target is R at the last step, and
    (1 - m) R + m Q'(s', μ'(s')) before it: with m = 1 the textbook's, which carries a reward back by one step per
    update, too slowly for a few hundred episodes; with m = 0 the episode's own return, blind to what another policy
    would do after this step. Actions are explored by normal noise, drawn again where it leaves [0, 1].
    Sources: DDPG, arXiv 1509.02971; truncated normal noise: AMC, arXiv 1802.03494.
    """

    def __init__(self, states: int, actions: int, rng: np.random.Generator, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.actions, self.rng = actions, rng
        hidden = self.settings.hidden
        self.actor, self.critic = (
            Network(rng, states, hidden, actions),
            Network(rng, states + actions, hidden, 1),
        )
        self.slow_actor, self.slow_critic = (
            Network(rng, states, hidden, actions),
            Network(rng, states + actions, hidden, 1),
        )
        self.slow_actor.approach(self.actor, 1.0)
        self.slow_critic.approach(self.critic, 1.0)
        self._memory: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []
        self._rewards: list[float] = []

    def act(self, state: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """The action (a,) in a state (s,), with noise of that standard deviation."""
        return self.explored(_sigmoid(self.actor(state[None]))[0], noise)

    def explored(self, action: np.ndarray, noise: float) -> np.ndarray:
        """An action with truncated normal noise around it."""
        if noise <= 0.0:
            return action
        found = action + noise * self.rng.standard_normal(action.shape)
        for _ in range(100):
            outside = (found < 0.0) | (found > 1.0)
            if not outside.any():
                break
            found = np.where(outside, action + noise * self.rng.standard_normal(action.shape), found)
        return np.clip(found, 0.0, 1.0)

    def remember(self, states: Sequence[np.ndarray], actions: Sequence[np.ndarray], reward: float) -> None:
        """Keep an episode, (s,) and (a,) by step, and the reward that it ended with."""
        following = [*states[1:], states[-1]]
        for i, (state, action, after) in enumerate(zip(states, actions, following, strict=True)):
            self._memory.append((state, action, after, i == len(states) - 1))
            self._rewards.append(reward)
        surplus = max(len(self._memory) - self.settings.replay, 0)
        del self._memory[:surplus], self._rewards[:surplus]

    def learn(self, updates: int) -> None:
        """So many steps of critic, actor and targets on transitions of the replay, rewards in units of its spread."""
        states, actions, following = (np.array([m[i] for m in self._memory]) for i in range(3))
        last = np.array([m[3] for m in self._memory])
        rewards = np.array(self._rewards)
        rewards = (rewards - rewards.mean()) / max(float(rewards.std()), 1e-12)
        s = self.settings
        for _ in range(updates):
            take = self.rng.integers(0, len(states), s.batch)
            after = following[take]
            ahead = self.slow_critic(np.hstack([after, _sigmoid(self.slow_actor(after))]))[:, 0]
            share = np.where(last[take], 0.0, s.bootstrap)
            target = (1.0 - share) * rewards[take] + share * ahead
            value = self.critic(np.hstack([states[take], actions[take]]))[:, 0]
            self.critic.backward((2.0 / s.batch * (value - target))[:, None])
            self.critic.descend(s.critic_rate)
            raw = self.actor(states[take])
            action = _sigmoid(raw)
            self.critic(np.hstack([states[take], action]))
            uphill = self.critic.backward(np.full((s.batch, 1), -1.0 / s.batch))[:, states.shape[1] :]
            self.actor.backward(uphill * action * (1.0 - action) + s.pull / s.batch * raw)
            self.actor.descend(s.actor_rate)
            self.slow_actor.approach(self.actor, s.average)
            self.slow_critic.approach(self.critic, s.average)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0)))
