"""Codebooks: exact where that can be checked, and of less error than what knows less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autocompress.obs import Assignment, Runs


def correlated(d: int, seed: int = 0) -> np.ndarray:
    """A damped Hessian of inputs that half as many things explain."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((d, d // 2)) @ rng.standard_normal((d // 2, 4 * d))
    H = 2.0 * X @ X.T / (4 * d)
    return H + 1e-2 * np.diag(H).mean() * np.eye(d)


def blocks(d: int, length: int, seed: int = 0) -> np.ndarray:
    """A Hessian of runs that do not interact, with blocks that do within."""
    H = correlated(d, seed)
    place = np.arange(d) // length
    return H * (place[:, None] == place[None, :])


def runs(rows: int = 8, d: int = 24, length: int = 3, groups: int = 1, H: np.ndarray | None = None) -> Runs:
    weight = np.random.default_rng(rows + d).standard_normal((groups, rows, d))
    hessian = np.stack([correlated(d, g) for g in range(groups)]) if H is None else H[None]
    return Runs(weight, hessian, length)


def words(count: int, length: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, length))


def loss(found: Runs, book: np.ndarray, assignment: Assignment) -> float:
    return found.error(assignment.words(book) - found.vectors)


def test_the_error_is_that_of_the_layer() -> None:
    found = runs(groups=2)
    change = np.random.default_rng(0).standard_normal(found.shape)
    flat = change.reshape(2, 8, 24)
    assert found.hessian is not None
    assert found.error(change) == pytest.approx(0.5 * np.einsum("grd,gde,gre->", flat, found.hessian, flat), rel=1e-12)


@pytest.mark.parametrize("price", [0.0, 0.4])
def test_nothing_is_better_where_runs_do_not_interact(price: float) -> None:
    """Each run by itself: the best of every word, its negative and zeros, by its own block of the Hessian."""
    found = runs(H=blocks(24, 3))
    book, bits = words(4, 3), price * np.random.default_rng(1).uniform(0, 4, 9)
    assert found.hessian is not None
    every = np.concatenate([-book[::-1], np.zeros((1, 3)), book])
    chosen = found.assigned(book, bits).index
    for r, s in itertools.product(range(8), range(8)):
        own = found.hessian[0][3 * s : 3 * s + 3, 3 * s : 3 * s + 3]
        change = every - found.vectors[0, r, s]
        costs = 0.5 * np.einsum("kl,lm,km->k", change, own, change) + bits
        assert chosen[0, r, s] == costs.argmin() - 4


def test_errors_are_fed_forward() -> None:
    """Decisions that know of H lose far less than those that know its blocks only."""
    found, blind = runs(16, H=correlated(24)), runs(16, H=blocks(24, 3))
    book = blind.clustered(6, plain=False)
    with_feedback, without = (loss(found, book, x.assigned(book)) for x in (found, blind))
    assert with_feedback < 0.75 * without, (with_feedback, without)


@pytest.mark.parametrize("price", [0.0, 0.3])
def test_an_improved_assignment_is_one_that_no_run_can_improve(price: float) -> None:
    found, book = runs(groups=2), words(3, 3)
    bits = price * np.random.default_rng(1).uniform(0, 4, 7)
    every = np.concatenate([-book[::-1], np.zeros((1, 3)), book])

    def cost(index: np.ndarray) -> float:
        return loss(found, book, Assignment(index, True)) + float(bits[index + 3].sum())

    start = found.assigned(book, bits)
    costs = [cost(found.improved(start, book, bits, sweeps).index) for sweeps in (0, 1, 2, 20)]
    assert costs[0] == cost(start.index)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]
    index = found.improved(start, book, bits, 20).index
    for place in np.ndindex(index.shape):
        for i in range(-3, 4):
            other = index.copy()
            other[place] = i
            assert cost(other) >= costs[-1] * (1 - 1e-6), (place, every[i + 3])


@pytest.mark.parametrize("signed", [False, True])
def test_a_refit_is_the_solution_of_the_normal_equations(signed: bool) -> None:
    found, count = runs(groups=2), 5
    book = words(count, 3)
    index = np.random.default_rng(4).integers(-count if signed else 0, count + 1 if signed else count, found.shape[:3])
    assignment = Assignment(index, signed)
    # ŵ = Z c of every row, element by element; the least squares of all rows under H.
    left, right = np.zeros((3 * count, 3 * count)), np.zeros(3 * count)
    assert found.hessian is not None
    for g, r in np.ndindex(index.shape[:2]):
        Z = np.zeros((24, 3 * count))
        for s, i in enumerate(index[g, r]):
            word, sign = (abs(i) - 1, np.sign(i)) if signed else (i, 1)
            if word >= 0:
                Z[3 * s : 3 * s + 3, 3 * word : 3 * word + 3] = sign * np.eye(3)
        left += Z.T @ found.hessian[g] @ Z
        right += Z.T @ found.hessian[g] @ found.weight[g, r]
    wanted = np.linalg.solve(left, right).reshape(count, 3)
    np.testing.assert_allclose(found.refitted(assignment, book, steps=60), wanted, rtol=1e-3, atol=1e-4)
    few = loss(found, found.refitted(assignment, book), assignment)
    assert loss(found, wanted, assignment) <= few <= 1.01 * loss(found, wanted, assignment)


def test_words_that_nothing_takes_stay_as_they_are() -> None:
    found, book = runs(), words(5, 3)
    index = np.where(np.arange(8) % 2, 1, -3) * np.ones(found.shape[:3], np.int64)
    after = found.refitted(Assignment(index, True), book)
    np.testing.assert_array_equal(after[[1, 3, 4]], book[[1, 3, 4]])
    assert (after[[0, 2]] != book[[0, 2]]).any(axis=1).all()


def test_k_means_of_output_error_minds_the_hessian_and_plain_does_not() -> None:
    H = np.kron(np.eye(8), np.diag([100.0, 1.0, 0.01])) + 1e-9 * np.eye(24)
    found = runs(64, H=H)
    ours, plain = found.clustered(6, plain=False), found.clustered(6, plain=True)
    np.testing.assert_array_equal(plain, runs(64, H=np.eye(24)).clustered(6, plain=True))
    spread = [np.abs(book).mean(axis=0) for book in (ours, plain)]
    assert spread[0][0] > 5 * spread[0][2]  # words differ where it matters
    assert spread[1][0] < 3 * spread[1][2]
    uneven = np.kron(np.diag([1.0] * 4 + [1e-4] * 4), np.eye(3))
    weight = np.random.default_rng(0).standard_normal((1, 64, 24)) * np.repeat([1.0, 5.0], 12)
    found = Runs(weight, uneven[None], 3)
    ours, plain = (
        Assignment(found.nearest(np.concatenate([book, -book])).index, False).words(np.concatenate([book, -book]))
        for book in (found.clustered(6, plain=p) for p in (False, True))
    )
    lost = [((x - found.vectors)[:, :, :4] ** 2).mean() for x in (ours, plain)]
    assert lost[0] < 0.7 * lost[1]  # and runs weigh what they cause


def test_groups_are_layers_of_their_own_that_share_the_words() -> None:
    found, book = runs(groups=3), words(4, 3)
    chosen = found.assigned(book).index
    assert found.hessian is not None
    for g in range(3):
        alone = Runs(found.weight[g : g + 1], found.hessian[g : g + 1], 3)
        np.testing.assert_array_equal(alone.assigned(book).index[0], chosen[g])


def test_rows_of_a_table_weigh_what_they_are_used() -> None:
    """Without columns that interact and with a price, only rows that matter pay for bits; words follow those rows."""
    weight, use = np.random.default_rng(2).standard_normal((1, 40, 12)), np.repeat([1e-6, 1.0], 20)
    found, book = Runs(weight, None, 3, use), words(5, 3)
    chosen = found.assigned(book, 0.05 * np.abs(np.arange(-5, 6)))
    assert (chosen.index[0, :20] == 0).all()
    assert (chosen.index[0, 20:] != 0).mean() > 0.5
    free = found.assigned(book)
    refit = found.refitted(free, book)
    for i in range(1, 6):
        mine = (
            np.sign(free.index[0, 20:])[..., None]
            * found.vectors[0, 20:]
            * (np.abs(free.index[0, 20:]) == i)[..., None]
        )
        np.testing.assert_allclose(refit[i - 1], mine.sum((0, 1)) / (np.abs(free.index[0, 20:]) == i).sum(), rtol=1e-3)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite; add damping"):
        runs(H=np.ones((24, 24))).assigned(words(3, 3))
