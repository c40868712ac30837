"""A short campaign of `make chaos`, which see: parts of a run are killed, and nothing of it shows in the tables."""

from __future__ import annotations

import pytest
from chaos.campaign import Campaign

KINDS = ("encoder", "commit step 3 kill", "connections cut", "raylet")


@pytest.mark.timeout(900)  # for a busy machine, where each start of Ray takes minutes; a quiet one needs one in all
@pytest.mark.parametrize("kinds", [KINDS, pytest.param((*KINDS, "supervisor"), marks=pytest.mark.slow)])
def test_run_when_its_parts_die_then_the_tables_are_those_of_a_run_in_which_nothing_died(kinds):
    report = Campaign(seed=4, n_faults=len(kinds), kinds=kinds, lanes=[1], serve=False).run()

    assert sorted(outcome.kind for outcome in report.outcomes) == sorted(kinds)
    assert report.starts == 1 + ("supervisor" in kinds)  # after Ray's death it begins again by itself
    assert min(report.rows.values()) > 0, "a table has no rows to compare"
    assert (report.differences, report.leftovers) == ([], [])
