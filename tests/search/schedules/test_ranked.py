# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Ranked layers against the whole model run plainly, and what the searches make of them."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from transformers import AutoModelForImageTextToText

from benchmarks.small_llava import SmallLlava
from tests.search.plain import plain_ranked_logits
from tests.search.test_model import ANSWER, PROMPTS, pictures, sample  # noqa: F401
from vllm_vtw.policy import BY_IMAGE, Policy, Stage
from vllm_vtw.search.checkpoint import read_config
from vllm_vtw.search.divergence import AnswerDivergence, TaskDivergence
from vllm_vtw.search.layerwise import answer_logits
from vllm_vtw.search.model import HFModel, Placement
from vllm_vtw.search.price import Price, RequestTokens
from vllm_vtw.search.schedules.baselines import baselines
from vllm_vtw.search.schedules.gsearch import least_sufficient
from vllm_vtw.search.schedules.lower_resolution import affordable_resolution
from vllm_vtw.search.schedules.psigmoid import MIN_R_MAX, affordable, cheapest, p_sigmoid, sigmoid
from vllm_vtw.search.schedules.sample_at_layer import SampleAtLayer
from vllm_vtw.search.schedules.schedule import GRID, merge_stages, policy_at_borders

KEEPS: tuple[list[float], ...] = ([1, 1, 1, 1], [1, 0.5, 0.5, 0.5], [1, 0.9, 0.312, 0], [1, 1, 0.25, 0.125])


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("backbone", ["llama", "qwen2", "mistral"])
def test_ranked_layers_are_what_the_plain_model_gives(llava, pictures, backbone, prompt):  # noqa: F811
    loaded = llava(SmallLlava(layers=4, kv_heads=1, image_side=4, backbone=backbone))
    plain = AutoModelForImageTextToText.from_pretrained(
        loaded.config._name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = loaded.encode(sample(prompt, pictures), ANSWER)
    answered = loaded.answer(inputs, ANSWER)
    asked = SampleAtLayer.of(loaded, "all", answered)
    for keeps in KEEPS:
        ours = answer_logits(loaded, asked.run_layers(loaded, 0, keeps).rows)
        wanted = plain_ranked_logits(plain, inputs.tensors, answered.tokens, keeps)
        torch.testing.assert_close(ours, wanted, atol=2e-4, rtol=2e-4)
        # Some of the way first, the rest later: the same.
        halfway = asked.run_layers(loaded, 0, keeps[:2]).run_layers(loaded, 2, keeps[2:])
        assert halfway.difference(loaded) == AnswerDivergence.between(asked.logits, ours)
    assert AnswerDivergence.between(asked.logits, ours).answer_kl[0] > 1e-6
    torch.testing.assert_close(asked.logits, answered.logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("ranking", ["key-norm", "variation", "uniform", "diversity"])
def test_other_rankings(llava, pictures, ranking, prompt):  # noqa: F811
    loaded = llava(SmallLlava(layers=4, kv_heads=1, image_side=4))
    plain = AutoModelForImageTextToText.from_pretrained(
        loaded.config._name_or_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = loaded.encode(sample(prompt, pictures), ANSWER)
    answered = loaded.answer(inputs, ANSWER)
    asked = SampleAtLayer.of(loaded, "all", answered).ranked_by(ranking)
    for keeps in (*KEEPS[1:], *([[0.5, 0.5, 0.25, 0]] if ranking in BY_IMAGE else [])):
        found = answer_logits(loaded, asked.run_layers(loaded, 0, keeps).rows)
        wanted = plain_ranked_logits(plain, inputs.tensors, answered.tokens, keeps, ranking)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    assert len(asked.ranked_by("random").rows.scores.unique()) == inputs.tensors["input_ids"].eq(
        plain.config.image_token_index
    ).sum() // prompt.count("<image>")


def test_llava_makes_as_many_tokens_of_smaller_pictures(llava, pictures):  # noqa: F811
    loaded = llava(SmallLlava(layers=4, kv_heads=1, image_side=4))
    one = sample(PROMPTS["one"], pictures)
    assert affordable_resolution(loaded, [one], 16, ANSWER, lambda keep: keep < 1) is None


def test_where_nothing_leaves_nothing_differs_in_bfloat16(pictures, tmp_path):  # noqa: F811
    """The answer was given token by token, which may round otherwise than reading it at once."""
    folder = str(SmallLlava(layers=4, kv_heads=1, image_side=4).save(tmp_path))
    config = read_config(folder)
    loaded = HFModel(folder, config, Placement.of("cpu", "bfloat16", config))
    answered = loaded.answer(loaded.encode(sample(PROMPTS["two"], pictures), ANSWER), ANSWER)
    token_by_token = answered.logits + 0.01 * torch.randn(answered.logits.shape)
    asked = SampleAtLayer.of(loaded, "all", replace(answered, logits=token_by_token))
    found = asked.run_layers(loaded, 0, [1] * 4).difference(loaded)
    assert (set(found.answer_kl), set(found.changed)) == ({0.0}, {False})


def test_the_least_number_that_is_within():
    for border in range(8):
        asked: list[int] = []

        def within(number: int, border: int = border, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number >= border

        assert least_sufficient(7, within) == border
        assert len(asked) <= 3


PRICE = Price(32, 12 * 4096 * 4096, 4096, RequestTokens(576, 64, 128))


FALLING = range(2, 32)
FOR_MEMORY = replace(PRICE, work_weight=1e-3)


def test_the_published_schedule_is_such_a_sigmoid():
    """Whose layers the paper counts from 1."""
    keeps = sigmoid(0.224, 11.6, 0.75, FALLING)
    published = {3: 0.65, 4: 0.64, 6: 0.62, 9: 0.50, 12: 0.485, 15: 0.235, 18: 0.18, 22: 0.07, 28: 0.04}
    assert keeps[:2] == [1, 1]
    assert all(abs(keeps[layer - 1] - keep) < 0.1 for layer, keep in published.items())
    assert not all(abs(keeps[layer] - keep) < 0.1 for layer, keep in published.items())


@given(
    st.floats(0.02, 3),
    st.floats(0, 32),
    st.integers(2, 5),
    st.sampled_from([(PRICE, PRICE.flops_share, 0.25), (FOR_MEMORY, PRICE.kv_share, 0.5)]),
    st.floats(0, 0.4),
)
@settings(max_examples=25, deadline=None)
def test_a_budget_is_held_and_spent(k, m, max_stages, spent, more):
    price, share, least = spent
    budget = least + more
    assert share(cheapest(2, max_stages, price)) <= budget
    afforded = affordable(k, m, 2, max_stages, price, share, budget)
    unspent = budget - share(afforded.policy)
    assert unspent >= 0
    # More is left only where the least more would cost too much: another width of KV-cache groups.
    more_tokens = sigmoid(k, m, afforded.r_max * 1.0001, FALLING)
    borders = [stage.layer for stage in afforded.policy.stages]
    with_more = [policy_at_borders(more_tokens, [*borders, border]) for border in range(2, 32)]
    assert unspent < 0.03 or any(
        share(policy) > budget for policy in with_more if len(policy.stages) < max_stages
    )
    assert len(afforded.policy.stages) < max_stages
    assert list(afforded.keeps) == sigmoid(k, m, afforded.r_max, FALLING)


def test_a_whole_budget_pays_for_everything():
    assert affordable(0.2, 12, 2, 4, PRICE, PRICE.flops_share, 1.0).policy == Policy(())


@given(st.floats(0.02, 3), st.floats(0, 32))
@settings(deadline=None)
def test_something_stays_before_the_decoder(k, m):
    keeps = sigmoid(k, m, MIN_R_MAX, range(32))
    assert keeps == [1 / GRID] + [0.0] * 31
    assert merge_stages(keeps, 4, PRICE) == cheapest(0, 4, PRICE)
    assert cheapest(0, 4, PRICE).stages[0] == Stage(0, 1 / GRID)


@given(st.floats(0.02, 3), st.floats(0, 32))
def test_every_sigmoid_comes_to_the_cheapest(k, m):
    assert (
        merge_stages(sigmoid(k, m, MIN_R_MAX, FALLING), 4, PRICE)
        == cheapest(2, 4, PRICE)
        == Policy.withdraw_at(2, 32)
    )


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    """The value of a policy stands in for what it does to answers."""

    def searched(storage: Path, trials: int, stop_at: int | None = None):
        seen: list[Policy] = []

        def effect(policy: Policy) -> dict[str, TaskDivergence]:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(policy)
            return {"any": TaskDivergence(abs(PRICE.kv_share(policy) - 0.3), 0, 0, 0)}

        def afford(k: float, m: float):
            return affordable(k, m, 2, 4, PRICE, PRICE.flops_share, 0.3)

        made: list[int] = []
        return p_sigmoid(afford, effect, 32, trials, 7, storage, made.append), made

    best, made = searched(tmp_path / "whole", 14)
    assert best[1] == 14
    assert made == list(range(15))
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "parts", 14, stop_at=3)
    again, made = searched(tmp_path / "parts", 14)
    assert (again, made) == (best, list(range(made[0], 15)))
    assert 0 < made[0] < 14
    parameters = [
        {tuple(trial.params.values()) for trial in study.get_trials() if trial.state.name != "FAIL"}
        for study in (stored(tmp_path / name) for name in ("whole", "parts"))
    ]
    assert parameters[0] == parameters[1]
    assert len(parameters[0]) == 14


def stored(storage: Path) -> optuna.Study:
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(storage))))


@pytest.mark.parametrize("share", [PRICE.flops_share, PRICE.kv_share])
def test_rivals_take_no_more(share):
    ours = Policy((Stage(4, 0.6), Stage(12, 0.3), Stage(20, 0.05)))
    found = baselines(ours, range(1, 32), share)
    published = found.pop("FastV as published, 0.5")
    assert published == Policy((Stage(2, 0.5),))
    for ranking in ("random", "uniform"):
        ((name, plain),) = [(name, one) for name, one in found.items() if one.ranked_by == ranking]
        (stage,) = plain.stages
        assert name == f"{ranking}, {stage.keep:.3g} from layer 0 on"
        assert stage.layer == 0
        next_one = Policy((replace(stage, keep=stage.keep + 1 / GRID),), ranked_by=ranking)
        assert share(plain) <= share(ours) < share(next_one)
        del found[name]
    for name, policy in found.items():
        assert share(ours) - 0.05 < share(policy) <= share(ours)
        (stage,) = policy.stages
        more = [replace(stage, layer=layer) for layer in range(stage.layer + 1, 32)]
        if stage.keep:
            more = [replace(stage, keep=part / GRID) for part in range(int(GRID * stage.keep) + 1, GRID)]
        assert all(share(Policy((one,))) > share(ours) for one in more)
        (stage,) = policy.stages
        fastv = f"FastV, {stage.keep:.3g} from layer 2 on"
        assert name == (fastv if stage.keep else f"VTW, K = {stage.layer}")
    assert len(found) == 2


def test_rivals_begin_where_the_model_allows():
    """As with the deepstack of Qwen3-VL, which adds visual features after the first three layers."""
    found = baselines(Policy((Stage(3, 0.1),)), range(3, 32), PRICE.flops_share)
    assert len(found) == 4
    assert all(stage.layer >= 3 for policy in found.values() for stage in policy.stages)
