"""Latents in the place of cached keys and values: the dense model's tokens at full rank, and what lower ranks take."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import autocompress as ac
from autocompress import kvcache
from autocompress.errors import BudgetError, InfeasibleError, LayerError, MismatchError, OptionError
from autocompress.kvcache import CacheProfile, profile_cache
from autocompress.tasks import load_task
from solvers import Problem, solve

TASKS = Path(__file__).resolve().parents[1] / "experiments" / "tasks"


def tiny(kind: str = "Llama", layers: int = 3, **more: Any) -> Any:
    """float64, so that what differs by rounding alone differs by 1e-9 at most; 4 heads, 2 KV heads of 8."""
    settings: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "initializer_range": 0.3,
        "sliding_window": None,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings | more))
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(parameter)
    return model.double().eval()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def batches(windows: int = 40, length: int = 24, seed: int = 1) -> list[dict[str, Any]]:
    rows = torch.randint(4, 60, (windows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "use_cache": False} for part in rows.split(8)]


@pytest.fixture(scope="module")
def profile() -> CacheProfile:
    return profile_cache(tiny(), batches())


def logits_step_by_step(model: Any, ids: torch.Tensor, cache: Any = None, start: int = 5, **more: Any) -> torch.Tensor:
    """Scores at every position: a prefill of `start` tokens, then one token after the other from the cache."""
    cache, found, at = DynamicCache() if cache is None else cache, [], 0
    for end in range(start, ids.shape[1] + 1):
        given = {name: x[:, at:end] if name == "position_ids" else x[:, :end] for name, x in more.items()}
        with torch.no_grad():
            out = model(input_ids=ids[:, at:end], past_key_values=cache, use_cache=True, **given)
        found.append(out.logits)
        at = end
    return torch.cat(found, dim=1)


def logits_at_once(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 9 and 5 tokens, the short one padded on the left, and their mask."""
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[1, :4] = 3
    return ids, (ids != 3).long()


@pytest.mark.parametrize(
    ("kind", "factors", "heads"),
    [
        ("Llama", "loss", "joint"),
        ("Llama", "weights", "each"),
        ("Mistral", "inputs", "joint"),
        ("Qwen2", "loss", "each"),
    ],
)
def test_at_full_rank_the_tokens_and_scores_are_the_dense_models(kind: str, factors: str, heads: str) -> None:
    dense = tiny(kind)
    made = ac.compress_cache(dense, batches(16), 10_000, "uniform", factors, heads)
    small: Any = made.model
    assert {sum(ranks) for ranks in made.plan.ranks.values()} == {16}
    ids, mask = padded()
    close(logits_at_once(small, ids), logits_at_once(dense, ids))
    close(logits_step_by_step(small, ids), logits_step_by_step(dense, ids))
    for more in ({}, {"attention_mask": mask}, {"attention_mask": mask, "num_beams": 3}):
        wanted, found = (
            m.generate(
                ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
            )
            for m in (dense, small)
        )
        assert found.sequences.tolist() == wanted.sequences.tolist()
        for a, b in zip(found.logits, wanted.logits, strict=True):
            close(a, b)
    assert len(set(wanted.sequences[0, 9:].tolist())) > 3  # so that there is something to compare


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"), [("sdpa", torch.float64, 1e-9), ("eager", torch.float32, 1e-4)]
)  # eager has its softmax in float32, and a float64 mask is infinite there
def test_at_low_rank_the_cache_gives_the_scores_of_a_whole_pass(
    profile: CacheProfile, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    small: Any = profile.apply(profile.plan("3x", "exact")).to(dtype)
    small.set_attn_implementation(attention)
    ids = torch.randint(4, 60, (2, 30), generator=torch.Generator().manual_seed(6))
    whole = logits_at_once(small, ids)
    close(logits_step_by_step(small, ids), whole, tolerance)
    close(logits_step_by_step(small, ids, StaticCache(small.config, 32)), whole, tolerance)
    assert (whole - logits_at_once(profile.context.model, ids)).abs().max() > 0.1  # it is not the dense model
    ids, mask = padded()
    alone = small.generate(ids[1:, 4:], max_new_tokens=12, do_sample=False)[0, 5:]
    beside = small.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[1, 9:]
    assert beside.tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["packed", "late", "reversed"])
def test_every_token_keeps_the_position_it_was_given(profile: CacheProfile, kind: str) -> None:
    """The place in the cache says nothing of the position: sequences packed in one row, or any other positions."""
    places = torch.arange(14)
    positions = {"packed": places % 6, "late": places + 1500, "reversed": 40 - places}[kind].expand(2, -1)
    ids = torch.randint(4, 60, (2, 14), generator=torch.Generator().manual_seed(7))
    small, dense = profile.apply(profile.plan(10_000, "uniform")), profile.context.model
    wanted = logits_step_by_step(dense, ids, position_ids=positions)
    close(logits_step_by_step(small, ids, position_ids=positions), wanted)
    if kind != "late":  # rotary scores depend on differences alone
        assert (wanted - logits_step_by_step(dense, ids)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_know_positions_that_they_cannot_hold_as_one_number(
    profile: CacheProfile, dtype: torch.dtype
) -> None:
    small: Any = profile.apply(profile.plan("2x", "exact")).to(dtype)
    cache: Any = DynamicCache()
    positions = torch.tensor([[0, 255, 256, 257, 300, 1999, 2047]])
    with torch.no_grad():
        small(input_ids=positions % 50 + 4, position_ids=positions, past_key_values=cache, use_cache=True)
    held = cache.layers[0].keys[0, 0, :, -2:].double() @ torch.tensor([1.0, 256.0], dtype=torch.float64)
    assert held.tolist() == positions[0].tolist()
    given = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}  # not packed: one sequence
    step = logits_step_by_step(small, positions % 50 + 4, start=3, **given).float()
    whole = logits_at_once(small, positions % 50 + 4, **given).float()
    assert (step - whole).abs().max() < 0.1 * whole.std()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["joint", "each"])
def test_the_plan_says_what_the_cache_takes(profile: CacheProfile, dtype: torch.dtype, heads: str) -> None:
    plan = profile.plan("3x", "exact", heads=heads)
    small: Any = profile.apply(plan).to(dtype)
    cache: Any = DynamicCache()
    ids = torch.randint(4, 60, (3, 11), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        small(input_ids=ids, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * 11 * plan.bytes_in(dtype)
    assert plan.bytes_per_token == plan.bytes_in(torch.float64) <= plan.budget_bytes
    assert plan.dense_bytes_per_token == 3 * 2 * 16 * 8
    assert plan.budget_bytes == plan.dense_bytes_per_token // 3


def test_losses_are_those_of_the_factors_and_the_least_of_their_kind(profile: CacheProfile) -> None:
    for pair in profile.layers.values():
        for p in pair:
            (best,), (inputs,), (plain,) = (p.blocks("joint", f) for f in ("loss", "inputs", "weights"))
            for block in (best, inputs, plain):
                for r in (1, 5, 15, 16):
                    D = p.weight - block.A[:, :r] @ block.B[:r]
                    loss, error = np.trace(p.G @ D @ p.C @ D.T) / 2, np.trace(D @ p.C @ D.T)
                    energy = np.trace(p.weight @ p.C @ p.weight.T)
                    assert block.losses[r - 1] == pytest.approx(loss, rel=1e-6, abs=1e-12)
                    assert block.errors[r - 1] == pytest.approx(error / energy, rel=1e-6, abs=1e-12)
            assert (best.losses <= inputs.losses + 1e-12).all()
            assert (inputs.errors <= plain.errors + 1e-12).all()
            # Eckart and Young, by eigenvalues of the product instead of by factors.
            values = np.sort(np.linalg.eigvals(p.G @ p.weight @ p.C @ p.weight.T).real)
            np.testing.assert_allclose(best.losses, [*(values[:-1].cumsum() / 2)[::-1].tolist(), 0.0], atol=1e-9)
            assert (best.losses[:15] < 0.999 * plain.losses[:15]).any()


def test_inputs_have_the_moments_of_a_token(profile: CacheProfile) -> None:
    seen: list[torch.Tensor] = []
    model = copy.deepcopy(profile.context.model)
    projection = model.get_submodule("model.layers.1.self_attn.v_proj")
    projection.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, 1)))
    for batch in profile.context.fit:
        logits_at_once(model, batch["input_ids"])
    x = torch.cat(seen).numpy()
    expected = x.T @ x / len(x)
    _, p = profile.layers["model.layers.1.self_attn"]
    expected += 1e-2 * np.diag(expected).mean() * np.eye(32)  # the damping of `calibrate`
    np.testing.assert_allclose(p.C, expected, rtol=1e-4, atol=1e-5)


def test_the_gradients_predict_the_kl_of_noise() -> None:
    """Noise ε of its own at every position of a projection's output: the KL per token is ½ tr(G E[ε εᵀ])."""
    model, data = tiny(layers=2), batches(80)
    profile = profile_cache(model, data)
    generator = torch.Generator().manual_seed(3)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"):
        (G,) = (p.G for pair in profile.layers.values() for p in pair if p.name == name)
        G = G - kvcache.DAMPING / (1.0 + kvcache.DAMPING) * np.diag(G).mean() * np.eye(16)
        spread = torch.rand(16, generator=generator, dtype=torch.float64) * 2e-3

        def noisy(_: Any, __: Any, output: torch.Tensor, spread: torch.Tensor = spread) -> torch.Tensor:
            return output + spread * torch.randn(output.shape, generator=generator, dtype=torch.float64)

        other = copy.deepcopy(model)
        other.get_submodule(name).register_forward_hook(noisy)
        found = np.mean([profile.context.divergence_of(other, "fit") for _ in range(6)])
        assert found == pytest.approx(0.5 * float(np.diag(G) @ spread.square().numpy()), rel=0.1)


def test_refined_gradients_are_a_third_those_of_the_compressed_model(profile: CacheProfile) -> None:
    """At full rank the compressed model is the dense one, and nothing changes; elsewhere predictions come closer."""
    at_full = profile.refined(profile.plan(10_000, "uniform"))
    for found, pair in zip(at_full.layers.values(), profile.layers.values(), strict=True):
        for a, b in zip(found, pair, strict=True):
            np.testing.assert_allclose(a.G, b.G, rtol=1e-6, atol=1e-12)
    plan = profile.plan("4x")
    low = profile.refined(plan)
    other = profile_cache(_materialised(profile.apply(plan), profile.context.model), batches())
    for found, pair, there in zip(low.layers.values(), profile.layers.values(), other.layers.values(), strict=True):
        for a, b, c in zip(found, pair, there, strict=True):
            np.testing.assert_allclose(a.G, (2.0 * b.G + c.G) / 3.0, rtol=1e-6, atol=1e-12)


def _materialised(small: Any, dense: Any) -> Any:
    """The dense model with the products of the factors as its weights."""
    model = copy.deepcopy(dense)
    for name, module in small.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(module.weight)
    return model


def test_exact_ranks_are_the_least_and_the_others_know_how_far_they_are(profile: CacheProfile) -> None:
    plans = {rule: profile.plan("2.5x", rule) for rule in kvcache.RULES}
    exact = plans["exact"]
    blocks = [block for pair in profile.layers.values() for p in pair for block in p.blocks("joint", "loss")]
    costs = [8 * np.arange(1, 17)] * 6
    room = exact.budget_bytes - 8
    assert exact.loss == solve(Problem([b.losses for b in blocks], costs, room), "dp").loss
    assert exact.gap == pytest.approx(0.0, abs=1e-9)
    for plan in plans.values():
        assert plan.bytes_per_token <= plan.budget_bytes
        assert plan.loss >= plan.bound
        assert plan.gap >= exact.gap
    assert plans["uniform"].gap > 0.05
    assert len(set(plans["uniform"].ranks.values())) == 1
    found = plans["outputs"]
    ranks = [r for (r,) in found.ranks.values()]
    errors = sum(b.errors[r - 1] for b, r in zip(blocks, ranks, strict=True))
    assert errors == solve(Problem([b.errors for b in blocks], costs, room), "dp").loss


def test_auto_is_no_worse_than_any_rule_on_data_that_no_statistics_saw(profile: CacheProfile) -> None:
    for budget in ("2x", "5x"):
        made = profile.compress(budget)
        small, auto, held = made.model, made.plan, profile.context.held
        for rule in kvcache.ALLOCATIONS[1:]:
            other = profile.compress(budget, rule).plan
            assert other.allocation == rule
            assert auto.measured is not None
            assert other.measured is not None
            assert auto.measured <= other.measured
        kl, count = 0.0, 0
        for batch in held:
            a, b = (logits_at_once(m, batch["input_ids"]).log_softmax(-1) for m in (profile.context.model, small))
            kl, count = kl + float((a.exp() * (a - b)).sum()), count + batch["input_ids"].numel()
        assert auto.measured == pytest.approx(kl / count, rel=1e-9)


def test_progressive_ranks_follow_the_cumulative_condition_numbers() -> None:
    model = tiny(layers=3)
    kappas = [(4.0, 2.0), (3.0, 5.0), (10.0, 1.0)]
    with torch.no_grad():
        for layer, pair in zip(model.model.layers, kappas, strict=True):
            for projection, kappa in zip((layer.self_attn.k_proj, layer.self_attn.v_proj), pair, strict=True):
                U, _, V = torch.linalg.svd(projection.weight, full_matrices=False)
                projection.weight.copy_(U @ torch.diag(torch.linspace(1.0, 1.0 / kappa, 16).double()) @ V)
    profile = profile_cache(model, batches(16))
    total = [math.log(4 * 2 * 3 * 5 * 10), math.log(3 * 5 * 10), math.log(10)]
    shares = [(t - total[2]) / (total[0] - total[2]) for t in total]
    found = [r for (r,) in profile.plan(8 * (2 * (16 + 12 + 7) + 1), "progressive").ranks.values()]
    low, middle = 7, round(7 + 9 * shares[1])
    assert middle == 12
    assert found == [16, 16, middle, middle, low, low]
    # Where even 1 in the last layer is too much beside full rank in the first, the first gets less.
    found = [r for (r,) in profile.plan(8 * 25, "progressive").ranks.values()]
    assert found[4:] == [1, 1]
    assert found == sorted(found, reverse=True)
    assert 1 < found[0] < 16
    assert 8 * (sum(found) + 1) <= 8 * 25


def test_the_model_stays_as_it_was_and_the_same_seed_gives_the_same_ranks() -> None:
    model, data = tiny(), batches(16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    made = [ac.compress_cache(model, data, "3x", "exact") for _ in range(2)]
    assert made[0].plan == made[1].plan
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    again = made[0].model.state_dict()
    assert all(torch.equal(again[name], x) for name, x in made[1].model.state_dict().items())
    assert all(name in again for name in before if not name.endswith(("k_proj.weight", "v_proj.weight")))


def test_what_cannot_be_done_is_refused(profile: CacheProfile) -> None:
    with pytest.raises(
        InfeasibleError, match=r"rank 1 everywhere.* take 56 bytes per token; the budget is 55"
    ) as error:
        profile.plan(55, "exact")
    assert error.value.smallest_bytes == 56
    assert profile.plan(56, "exact").elements == 6
    with pytest.raises(InfeasibleError, match=r"heads='each'.* 104 bytes"):
        profile.plan(103, "exact", heads="each")
    with pytest.raises(BudgetError, match=r"needed bytes per token, or a ratio"):
        profile.plan("3bpw")
    for wrong in ({"allocation": "best"}, {"factors": "svd"}, {"heads": "all"}):
        with pytest.raises(OptionError, match=f"{next(iter(wrong))} is .*; it is one of"):
            profile.compress("2x", **wrong)
    plan = profile.plan("4x")
    with pytest.raises(MismatchError, match="of another profile"):
        profile.refined(plan).apply(plan)
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**shape))  # type: ignore[arg-type]
    longer = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    refused = [
        (bert, "BertModel has no attention layer whose cache is known"),
        (tiny("Mistral", sliding_window=8), "attends to a sliding window"),
        (tiny(rope_parameters=longer), "'dynamic' turn a token by how long"),
        (profile.apply(profile.plan("2x", "uniform")), "has no attention layer whose cache is known"),
    ]
    for model, words in refused:
        with pytest.raises(LayerError, match=words):
            profile_cache(model, batches(8))


def test_a_cache_that_forgets_or_rounds_is_refused(profile: CacheProfile) -> None:
    class Forgetful(transformers.cache_utils.DynamicLayer):
        keys: Any

        def update(self, key_states: Any, value_states: Any, *args: Any, **more: Any) -> Any:
            found = super().update(key_states, value_states, *args, **more)
            self.keys = self.keys[..., -3:, :]
            return found

    small = profile.apply(profile.plan("2x", "uniform"))
    cache = transformers.Cache(layers=[Forgetful() for _ in range(3)])
    ids = torch.randint(4, 60, (1, 8), generator=torch.Generator().manual_seed(8))
    with pytest.raises(LayerError, match=r"keeps \(1, 3\) tokens as they are, of \(1, 8\); needed a DynamicCache"):
        small(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(LayerError, match=r"position 20000000 is beyond the model's 2048"):
        small(input_ids=ids, position_ids=torch.full((1, 8), 20_000_000), past_key_values=DynamicCache())


@pytest.mark.data
@pytest.mark.usefixtures("data_folder")
def test_the_small_llama_remembers_its_stories_in_half_the_bytes() -> None:
    task = load_task(TASKS / "stories260k.py")
    dense: Any = task.build_model()
    profile = profile_cache(dense, task.calibration_batches(0)[:6])
    stories = sys.modules["language"].stories()
    ids = stories[50][None, :40]
    whole: Any = profile.apply(profile.plan(1284, "uniform"))
    assert (
        whole.generate(ids, max_new_tokens=40, do_sample=False).tolist()
        == dense.generate(ids, max_new_tokens=40, do_sample=False).tolist()
    )
    made = profile.compress("2x")
    plan = made.plan
    assert plan.bytes_per_token <= 640 == plan.dense_bytes_per_token // 2
    assert plan.bytes_in(torch.float16) <= 320 + 2
    assert plan.allocation in ("exact", "refined")
    uniform = profile.measured(profile.plan("2x", "uniform"))
    assert plan.measured is not None
    assert uniform.measured is not None
    assert plan.measured < 0.6 * uniform.measured
    step, at_once = logits_step_by_step(made.model, ids), logits_at_once(made.model, ids)
    close(step, at_once, 1e-4)
