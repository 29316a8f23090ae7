"""Budgets of runs."""

import re

import pytest

from grpo.settings import parse
from grpo.settings.budget import Budget, Spent, budget_settings, parse_budget
from wan_jax.errors import UserError


def test_a_budget_is_reached_by_one_of_its_limits():
    spent = Spent(10, 1.0) + Spent(5, 0.5)
    assert spent == Spent(15, 1.5)
    assert Budget(evaluations=15).reached(spent) and Budget(seconds=1.5).reached(spent)
    assert Budget(evaluations=99, seconds=1.0).reached(spent)
    assert not Budget(evaluations=16, seconds=1.6).reached(spent) and not Budget().reached(spent)


@pytest.mark.parametrize("key", ["evaluations", "seconds"])
def test_a_limit_that_allows_nothing_is_refused(c, key):
    c.budget[key] = 0
    with pytest.raises(UserError, match=rf"config\.budget\.{key}=0"):
        parse.recipe_from_config(c)


def test_budgets():
    assert parse_budget("evaluations:200") == ("evaluations", 200) and parse_budget(
        "seconds:1.5"
    ) == ("seconds", 1.5)
    assert budget_settings("epochs", 3) == ("epochs=3",)
    assert budget_settings("seconds", 1.5)[1] == "budget.seconds=1.5"
    for bad in (
        "20",
        "epochs:0",
        "epochs:1.5",
        "hours:2",
        "seconds:-1",
        "seconds:inf",
        "evaluations:many",
    ):
        with pytest.raises(UserError, match=f"--budget={re.escape(bad)}"):
            parse_budget(bad)
