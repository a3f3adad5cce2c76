"""The learner: its gradients, and a problem whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.strategies.ddpg import Agent, Network, Settings


def test_gradients_are_those_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    net = Network(rng, 3, 8, 2)
    net.values[:] = 0.5 * rng.standard_normal(net.values.size)  # biases of 0 would put dead units on their kink
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


def test_an_agent_learns_what_every_state_wants() -> None:
    """A bandit with six states, each with an action of its own that pays most, two hundred pulls in all."""
    rng = np.random.default_rng(1)
    states, wanted = np.eye(6), rng.random((6, 2))
    agent = Agent(6, 2, rng)
    for pull in range(200):
        state = int(rng.integers(6))
        action = rng.random(2) if pull < 30 else agent.act(states[state], 0.3 * 0.99**pull)
        agent.remember([states[state]], [action], -float(((action - wanted[state]) ** 2).sum()))
        if pull >= 30:
            agent.learn(3)
    learnt = np.array([agent.act(state) for state in states])
    blind = ((rng.random((1000, 6, 2)) - wanted) ** 2).sum(axis=2).mean()
    assert ((learnt - wanted) ** 2).sum(axis=1).mean() < blind / 5


def test_a_reward_at_the_end_reaches_the_first_step() -> None:
    """Three steps, of which only the first is paid for."""
    rng = np.random.default_rng(0)
    states = list(np.eye(3))
    agent = Agent(3, 1, rng)
    for episode in range(200):
        actions = [rng.random(1) if episode < 40 else agent.act(state, 0.2) for state in states]
        agent.remember(states, actions, -abs(float(actions[0][0]) - 0.3))
        if episode >= 40:
            agent.learn(4)
    assert abs(float(agent.act(states[0])[0]) - 0.3) < 0.1


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
