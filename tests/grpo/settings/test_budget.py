"""Budgets of runs."""

import pytest

from grpo.settings import parse
from grpo.settings.budget import Budget, Spent
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
