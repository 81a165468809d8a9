"""The report of a grid: what it compares, and its tables, against numbers worked out by hand and by scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from ablation_records import RUN, final, found_in, record_of, records_of
from lora_da_core.ablation import comparison, downstream, make_grid
from lora_da_core.ablation.downstream import at_best, reached, stays_below, worst_rate
from lora_da_core.ablation.tables import MOST_STEPS, at_best_table, cost_table, difference_table, failure_table


class TestComparison:
    def test_differences_are_paired_by_seed(self):
        ours, base = {0: 1.0, 1: 2.5, 2: 4.0}, {0: 1.5, 1: 2.75, 2: 4.75, 3: 99.0}
        records = [record_of("kfac", seed, final(loss)) for seed, loss in ours.items()]
        records += [record_of("", seed, final(loss), baseline="default") for seed, loss in base.items()]
        (found,) = comparison.differences(found_in(*records), "default")
        gaps = np.array([-0.5, -0.25, -0.75])
        expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
        assert found.interval.count == 3 and found.interval.mean == pytest.approx(-0.5)
        assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
        assert found.interval.half == pytest.approx((expected.high - expected.low) / 2)
        assert (found.mean, found.other) == pytest.approx((2.5, 3.0))

    def test_a_rank_is_compared_to_its_own_and_a_diverged_seed_is_left_out(self):
        records = [record_of("kfac", 0, final(1.0), rank=4), record_of("kfac", 1, final(None), rank=4)]
        records += [record_of("", s, final(2.0), rank=4, baseline="default") for s in (0, 1)]
        records += [record_of("", s, final(7.0), rank=8, baseline="default") for s in (0, 1)]
        (found,) = comparison.differences(found_in(*records), "default")
        assert found.interval.count == 1 and found.interval.mean == -1.0 and math.isnan(found.interval.low)

    def test_the_best_rate_is_each_ones_own(self):
        ours = record_of("kfac", 0, final(3.0) | final(2.0, 1e-2))
        other = record_of("", 0, final(1.0) | final(None, 1e-2), baseline="default")
        found = comparison.differences(found_in(ours, other), "default")
        assert {each.measure: each.interval.mean for each in found} == {"loss, lr 0.001": 2.0, "loss, best lr": 1.0}

    def test_a_rate_that_more_seeds_survive_is_better_than_a_lower_loss(self):
        curves = {0: final(3.0) | final(1.0, 1e-2), 1: final(3.0) | final(None, 1e-2)}
        (found,) = found_in(*(record_of("kfac", seed, each) for seed, each in curves.items()))
        assert comparison.best_rate(found) == 1e-3

    def test_labels_tell_configurations_apart(self):
        axes = {"estimator": ["kfac", {"name": "kfac", "output": "full"}, "ekfac"], "solver": ["auto", "eigh"]}
        axes |= {"beta": [0.03, 1.0], "rank": [2, 4], "baseline": ["eva"]}
        found = found_in(*records_of(make_grid({"run": {**RUN, "seeds": [0, 1]}, "grid": axes})))
        labels = [each.label for each in found]
        assert len(labels) == len(set(labels)) == 3 * 2 * 2 * 2 + 2
        assert "kfac(output=full) eigh β=1 r=4" in labels and "PEFT eva r=2" in labels
        assert {each.kind for each in found} == {"kfac(output=diagonal)", "kfac(output=full)", "ekfac", "PEFT eva"}

    def test_records_of_a_version_that_knew_fewer_settings_are_still_compared(self):
        old, new = record_of("kfac", 0, final(1.0)), record_of("ekfac", 0, final(2.0), unconverged="warn")
        del old["unconverged"]
        (found,) = comparison.differences(found_in(old, new), "kfac")
        assert found.configuration.label == "ekfac unconverged=warn" and found.interval.mean == 1.0

    def test_what_a_preset_changes_is_told_by_its_name(self):
        grid = make_grid({"run": RUN, "grid": [{"preset": ["robust", "paper"], "beta": [0.03, 1.0]}]})
        labels = [each.label for each in found_in(*records_of(grid))]
        assert labels == ["robust kfac β=0.03", "robust kfac β=1", "paper kfac β=0.03", "paper kfac β=1"]

    def test_cells_with_a_penalty_are_compared_to_those_without(self):
        penalised = {"regularizer": "laplace", "regularizer_options": {"strength": 2.0}, "source_fisher": "diagonal"}
        records = [record_of("kfac", seed, final(2.0), **penalised, cell=f"p{seed}") for seed in (0, 1)]
        records += [record_of("kfac", seed, final(1.0 + seed)) for seed in (0, 1)]
        found = found_in(*records)
        assert [each.name for each in found] == ["kfac + laplace of diagonal", "kfac"]
        assert all(comparison.counterpart(found, each, "kfac") is found[1] for each in found)
        (difference,) = comparison.differences(found, "kfac")
        assert difference.configuration is found[0] and difference.interval.mean == 0.5


class TestAtBest:
    """Two seeds, batches of 16: an initialisation of 64 samples costs 4 steps."""

    OURS = ({0: 3.0, 10: 1.9, 20: 1.5}, {0: 3.2, 10: 2.3, 20: 1.7})
    BASE = ({0: 4.0, 10: 2.5, 20: 2.0}, {0: 4.0, 10: 3.1, 20: 2.4})

    @pytest.fixture
    def entries(self):
        records = [
            record_of("kfac", seed, {1e-3: curve, 1e-2: {0: 9, 10: 9, 20: 3 + seed}})
            for seed, curve in enumerate(self.OURS)
        ]
        records += [record_of("", s, {1e-3: c}, baseline="default", passes=0) for s, c in enumerate(self.BASE)]
        ours, base = at_best(found_in(*records), "default", batch_size=16)
        return ours, base

    def test_losses_and_paired_differences_at_every_step(self, entries):
        ours, base = entries
        assert (ours.rate, base.rate, base.is_base, ours.is_base) == (1e-3, 1e-3, True, False)
        assert {step: band.mean for step, band in ours.losses.items()} == pytest.approx({0: 3.1, 10: 2.1, 20: 1.6})
        assert not base.differences and list(ours.differences) == [0, 10, 20]
        for step, gap in ours.differences.items():
            gaps = [mine[step] - other[step] for mine, other in zip(self.OURS, self.BASE, strict=True)]
            expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
            assert (gap.low, gap.mean, gap.high) == pytest.approx((expected.low, np.mean(gaps), expected.high))

    def test_steps_to_the_baselines_minimum(self, entries):
        ours, base = entries
        # Base mean: 4, 2.8, 2.2. Ours: 3.1, 2.1, 1.6, so 2.2 is reached at nine tenths of the first ten steps.
        assert ours.reach == pytest.approx(9.0) and ours.reach_share == pytest.approx(0.45)
        assert (base.reach, base.reach_share) == (20.0, 1.0)

    def test_compute_counts_the_initialisation(self, entries):
        ours, base = entries
        assert (ours.start_cost, base.start_cost) == (4.0, 0.0) and math.isnan(base.ahead_from)
        # From 4 on: ours 3.1 − 0.1 (x − 4), base 4 − 0.12 x, 3.52 at 4; ours is below from its start.
        assert ours.ahead_from == 4.0

    def test_compute_counts_what_the_line_search_sends_forward_as_half(self, entries):
        each = entries[0].configuration
        for record in each.by_seed.values():
            record["searched"] = 16
        batch_size = each.first["samples"] * each.mean("passes") / 4.0
        assert downstream.start_cost(each, batch_size) == pytest.approx(4.0 + 8 / batch_size)

    def test_the_worst_rate_costs_its_final_loss_less_the_best_ones(self, entries):
        ours, base = entries
        assert ours.worst.mean == pytest.approx(np.mean([3 - 1.5, 4 - 1.7])) and ours.worst.count == 2
        assert math.isnan(base.worst.mean)

    def test_the_worst_of_several_rates_counts(self):
        (found,) = found_in(record_of("kfac", 0, final(1.0) | final(4.0, 1e-2) | final(2.5, 1e-4)))
        assert worst_rate(found).mean == 3.0

    def test_without_a_common_seed_there_is_no_difference(self):
        records = [record_of("kfac", 0, final(2.0)), record_of("", 1, final(3.0), baseline="default")]
        ours = at_best(found_in(*records), "default", 16)[0]
        assert ours.final == 2.0 and not ours.differences and math.isnan(ours.reach) and math.isnan(ours.ahead_from)

    def test_a_rate_at_which_a_seed_diverged_is_the_worst(self):
        (found,) = found_in(record_of("kfac", 0, final(1.0) | final(None, 1e-2)))
        assert worst_rate(found).mean == math.inf

    def test_seeds_that_only_one_side_has_are_not_compared(self):
        records = [record_of("kfac", 0, final(2.0)), record_of("kfac", 1, final(1.0))]
        records += [record_of("", 0, final(3.0), baseline="default"), record_of("", 2, final(1.0), baseline="default")]
        ours = at_best(found_in(*records), "default", 16)[0]
        assert ours.final == 1.5 and (ours.differences[5].mean, ours.differences[5].count) == (-1.0, 1)
        # The baseline's minimum is that of seed 0: 3. Ours falls from 9 to 2 there.
        assert ours.reach == pytest.approx(5 * 6 / 7)

    @pytest.mark.parametrize(
        ("curve", "level", "place"),
        [
            ([(0, 4.0), (10, 2.0)], 3.0, 5.0),
            ([(0, 4.0), (10, 2.0)], 4.0, 0.0),
            ([(0, 4.0), (10, 2.0)], 2.0, 10.0),
            ([(0, 4.0), (10, 2.0)], 1.0, math.inf),
            ([(0, 4.0), (10, 2.0), (20, 5.0), (30, 1.0)], 1.5, 28.75),
            ([(5, 4.0)], 4.5, 5),
            ([], 1.0, math.inf),
        ],
    )
    def test_reached(self, curve, level, place):
        assert reached(curve, level) == pytest.approx(place)

    @pytest.mark.parametrize(
        ("curve", "other", "place"),
        [
            ([(0, 5.0), (10, 1.0)], [(0, 4.0), (10, 2.0)], 5.0),
            ([(0, 1.0), (10, 1.0)], [(0, 4.0), (10, 2.0)], 0),
            ([(0, 1.0), (10, 3.0)], [(0, 4.0), (10, 2.0)], math.inf),
            # Below, above from 2 to 6, below again; and the curves have no place in common but the ends.
            ([(0, 1.0), (4, 3.0), (8, 1.0)], [(0, 2.0), (8, 2.0)], 6.0),
            ([(8, 5.0), (28, 1.0)], [(0, 4.0), (20, 2.0)], math.inf),
            ([(4, 5.0), (24, 1.0)], [(0, 4.0), (20, 2.0)], 18.0),
            ([(30, 5.0), (40, 1.0)], [(0, 4.0), (20, 2.0)], math.nan),
            ([(math.nan, 5.0), (math.nan, 1.0)], [(0, 4.0), (20, 2.0)], math.nan),
        ],
    )
    def test_stays_below(self, curve, other, place):
        assert stays_below(curve, other) == pytest.approx(place, nan_ok=True)

    def test_without_a_baseline_nothing_is_compared(self):
        (entry,) = at_best(found_in(record_of("kfac", 0, final(2.0))), None, 16)
        assert entry.base is None and not entry.differences and math.isnan(entry.reach)
        table = at_best_table([entry], "held-out loss", None)
        assert not any("minimum" in column.group for column in table.columns)


class TestTables:
    def test_differences_are_sorted_and_marked_where_the_interval_excludes_zero(self):
        losses = {"kfac": (1.0, 1.1), "ekfac": (3.0, 3.1), "diagonal": (1.5, 2.4), "default": (2.0, 2.05)}
        records = [
            record_of(name, seed, final(loss), baseline=name if name == "default" else None, estimator_options={})
            for name, pair in losses.items()
            for seed, loss in enumerate(pair)
        ]
        rows = difference_table(comparison.differences(found_in(*records), "default")).rows
        assert [row[0].text for row in rows] == ["kfac", "diagonal", "ekfac"]
        assert [row[-1].tone for row in rows] == ["better", "", "worse"]
        for row, mean in zip(rows, (-0.975, -0.075, 1.025), strict=True):
            gaps = [a - b for a, b in zip(losses[row[0].text], losses["default"], strict=True)]
            bounds = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
            mark = {"better": " ▼", "worse": " ▲", "": ""}[row[-1].tone]
            assert row[-1].text == f"{mean:+.4f} [{bounds.low:+.4f}, {bounds.high:+.4f}]{mark}"

    def test_a_difference_that_is_shown_as_zero_is_not_marked(self):
        records = [
            record_of(
                name, seed, final(1.0 + shift), baseline=name if name == "default" else None, estimator_options={}
            )
            for name, shift in (("kfac", 1e-7), ("default", 0.0))
            for seed in range(3)
        ]
        (row,) = difference_table(comparison.differences(found_in(*records), "default")).rows
        assert (row[-1].text, row[-1].tone) == ("+0.0000 [+0.0000, +0.0000]", "")

    def test_at_most_so_many_steps_the_first_and_the_last_among_them(self):
        curve = {step: 10.0 - step for step in range(10)}
        entries = at_best(found_in(record_of("kfac", 0, {1e-3: curve})), None, 16)
        shown = [column.title for column in at_best_table(entries, "loss", None).columns if column.group]
        assert len(shown) == MOST_STEPS and (shown[0], shown[-1]) == ("0", "9")

    def test_never_and_diverged_are_said(self):
        records = [
            record_of("kfac", 0, final(7.0) | final(None, 1e-2)),
            record_of("", 0, final(2.0), baseline="default"),
        ]
        entries = at_best(found_in(*records), "default", 16)
        table = at_best_table(entries, "loss", "PEFT default")
        by_title = dict(zip([column.title for column in table.columns], table.rows[1], strict=True))
        assert by_title["configuration"].text == "kfac" and by_title["worst lr costs"].text == "diverged"
        assert {by_title[name].text for name in ("steps", "share", "ahead from")} == {"never"}

    def test_seeds_that_failed_alike_share_a_row(self):
        errors = {0: "too large", 1: "too large", 2: "other"}
        failed = [
            record_of("kfac", seed, {}, status="failed", error=error, notes=["raised in f (a.py, line 1)"])
            for seed, error in errors.items()
        ]
        rows = failure_table(failed).rows
        assert [(row[2].text, row[3].text.split(" (")[0]) for row in rows] == [("0, 1", "too large"), ("2", "other")]
        assert rows[0][4].text == "kfac2s0, kfac2s1" and "(raised in f (a.py, line 1))" in rows[0][3].text

    def test_costs_are_by_angle_and_name_what_is_unbeaten(self):
        costs = {"kfac": (1.0, 0.5), "ekfac": (2.0, 0.1), "diagonal": (3.0, 0.3)}
        records = [record_of(name, 0, {}, angle=angle, seconds=seconds) for name, (seconds, angle) in costs.items()]
        rows = [[cell.text for cell in row] for row in cost_table(found_in(*records)).rows]
        assert [row[0] for row in rows] == ["ekfac", "diagonal", "kfac"]
        assert [row[1] for row in rows] == ["time, memory", "", "time"]
