"""The learner: its gradients, and a problem whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.strategies.ddpg import Agent, Network, Settings


def test_gradients_are_those_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    net = Network(rng, 3, 8, 2)
    x, weights = rng.standard_normal((5, 3)), rng.standard_normal((5, 2))

    def loss() -> float:
        return float((net(x) * weights).sum())

    loss()
    to_inputs = net.backward(weights)
    found = net.gradient.copy()
    small = 1e-6
    for i in rng.permutation(net.values.size)[:40]:
        net.values[i] += small
        above = loss()
        net.values[i] -= 2 * small
        below = loss()
        net.values[i] += small
        assert found[i] == pytest.approx((above - below) / (2 * small), rel=1e-4, abs=1e-7)
    for i in np.ndindex(x.shape):
        x[i] += small
        above = loss()
        x[i] -= 2 * small
        below = loss()
        x[i] += small
        assert to_inputs[i] == pytest.approx((above - below) / (2 * small), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("bootstrap", [0.0, 0.5])
def test_an_agent_learns_what_every_state_wants(bootstrap: float) -> None:
    """Six states, each with an action of its own that pays most: far closer to it than the best of as many random ones."""
    rng = np.random.default_rng(1)
    states = np.eye(6)
    wanted = rng.random((6, 2))
    agent = Agent(6, 2, rng, Settings(bootstrap=bootstrap))

    def reward(actions: np.ndarray) -> float:
        return -float(((actions - wanted) ** 2).sum())

    blind = max(reward(rng.random((6, 2))) for _ in range(150))
    for episode in range(150):
        noise = 0.5 * 0.97**episode
        actions = [agent.explored(rng.random(2), 0.1) if episode < 20 else agent.act(s, noise) for s in states]
        agent.remember(list(states), actions, reward(np.array(actions)))
        if episode >= 20:
            agent.learn(12)
    learnt = reward(np.array([agent.act(s) for s in states]))
    assert learnt > blind / 4, (learnt, blind)


def test_actions_stay_where_they_are_allowed_and_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    agent = Agent(2, 3, rng, Settings(replay=10))
    found = np.array([agent.act(rng.standard_normal(2), 2.0) for _ in range(200)])
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert found.std() > 0.2
    assert np.array_equal(agent.act(np.ones(2)), agent.act(np.ones(2)))
    for reward in range(8):
        agent.remember([np.ones(2)] * 3, [np.zeros(3)] * 3, float(reward))
    assert len(agent._memory) == len(agent._rewards) == 10
    assert agent._rewards[-1] == 7.0
