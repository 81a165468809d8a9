"""The report of a grid: what its pictures show, what it says of its origin, and the page itself."""

import io
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.text import Annotation

from ablation_records import RUN, entry_of, final, found_in, record_of, records_of
from lora_da_core.ablation import figures, make_grid, provenance, read_grid
from lora_da_core.ablation.axes import NEEDED_MODULES
from lora_da_core.ablation.downstream import at_best
from lora_da_core.ablation.figures import Picture
from lora_da_core.ablation.labels import Box, Named, place_labels
from lora_da_core.ablation.loss_figures import MOST_CURVES, leading, loss_pictures
from lora_da_core.ablation.page import Cell, Column, Section, Table, markdown, page
from lora_da_core.ablation.report import sections

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class TestPictures:
    @given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1.5)), min_size=1, max_size=12))
    @settings(max_examples=50, deadline=None)
    def test_the_front_is_what_no_other_beats(self, points):
        records = [record_of(f"e{place}", 0, {}, seconds=x, angle=y) for place, (x, y) in enumerate(points)]
        found = found_in(*records)
        front = {(each.first["seconds"], each.first["angle"]) for each in figures.front_of(found, "seconds")}
        expected = {(x, y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)}
        assert front == expected

    @given(st.integers(0, 2**16), st.integers(1, 40))
    @settings(max_examples=15, deadline=None)
    def test_names_never_cover_each_other_or_a_point_or_leave_the_axes(self, seed, count):
        draw = np.random.default_rng(seed)
        points = {f"name {place} {'x' * draw.integers(20)}": tuple(draw.normal(size=2)) for place in range(count)}
        figure = figures.new_figure(["a"])
        axes = figure.subplots()
        axes.plot(*zip(*points.values(), strict=True), "o")
        written = place_labels(axes, [Named(*each) for each in points.items()])
        figure.canvas.draw()
        notes = [note for note in axes.findobj(Annotation) if note.get_text()]
        assert sorted(note.get_text() for note in notes) == sorted(written) and written
        boxes = [Box(*note.get_window_extent().extents) for note in notes]
        frame = Box(*axes.get_window_extent().extents)
        assert all(box.within(frame) for box in boxes)
        assert not any(box.meets(other) for place, box in enumerate(boxes) for other in boxes[:place])
        for x, y in axes.transData.transform(list(points.values())):
            assert not any(box.left < x < box.right and box.bottom < y < box.top for box in boxes)

    def test_all_names_are_written_where_there_is_room(self):
        figure = figures.new_figure(["a"])
        axes = figure.subplots()
        points = {f"configuration {place}": (float(place % 3), float(place)) for place in range(9)}
        axes.plot(*zip(*points.values(), strict=True), "o")
        axes.margins(0.2)
        assert place_labels(axes, [Named(*each) for each in points.items()]) == list(points)

    @pytest.mark.parametrize(
        ("costs", "scale"), [([1, 2, 5], "linear"), ([0.01, 2, 5], "log"), ([0, 2, 500], "symlog"), ([0, 0], "linear")]
    )
    def test_a_cost_axis_is_logarithmic_where_costs_are_far_apart(self, costs, scale):
        axes = figures.new_figure(["a"]).subplots()
        figures.cost_axis(axes.xaxis, costs)
        assert axes.get_xscale() == scale

    def test_zeros_everywhere_are_drawn(self):
        records = [record_of(f"e{place}", 0, {}, angle=0.0, seconds=0.0, peak_bytes=0) for place in range(3)]
        records += [record_of("e9", 0, {}, angle=1e-9, seconds=9.0, peak_bytes=2**30)]
        drawn = figures.cost_pictures(found_in(*records))
        assert [picture.name for picture in drawn] == ["cost_time_r2", "cost_memory_r2"]
        for picture in drawn:
            pixels = imread(io.BytesIO(picture.png))[..., :3]
            assert pixels.shape[1] > 800 and 0.01 < (pixels.min(-1) < 0.9).mean() < 0.5

    def test_ranks_are_drawn_apart_and_no_more_than_so_many(self):
        found = found_in(*(record_of("kfac", 0, {}, rank=rank) for rank in (32, 4, 8, 16, 64)))
        drawn = [picture.name for picture in figures.cost_pictures(found)]
        assert drawn == [f"cost_{what}_r{rank}" for rank in (4, 8, 16, 32) for what in ("time", "memory")]

    def test_curves_are_the_best_ones_and_the_baselines(self):
        records = [record_of(f"e{place}", 0, final(float(place))) for place in range(MOST_CURVES + 3)]
        records.append(record_of("", 0, final(99.0), baseline="default"))
        entries = at_best(found_in(*records), "default", 16)
        shown = [entry.configuration.label for entry in leading(entries)]
        assert shown == ["PEFT default", *(f"e{place}" for place in range(MOST_CURVES))]

    def test_pictures_that_would_be_empty_are_left_out(self):
        entries = at_best(found_in(record_of("kfac", 0, final(1.0), passes=0)), None, 16)
        assert [picture.name for picture in loss_pictures(entries, "loss")] == ["losses_r2"]
        records = [
            record_of("kfac", 0, final(1.0) | final(None, 1e-2)),
            record_of("", 0, final(2.0), baseline="default"),
        ]
        entries = at_best(found_in(*records), "default", 16)
        names = [picture.name for picture in loss_pictures(entries, "loss")]
        assert names == ["losses_r2", "differences_r2", "rates_r2", "compute_r2"]


class TestProvenance:
    @pytest.mark.parametrize(
        "grid",
        [
            *sorted((EXAMPLES / "grids").glob("*.toml")),
            {
                "run": {**RUN, "seeds": [1, 3], "prompt_template": 'say "{x}"\n→', "target_modules": ["q_proj", "v"],
                        "finetune": {"steps": 9, "learning_rates": [1e-6, 3e-4], "eval_steps": [0, 9]}},
                "grid": [
                    {"preset": ["paper", "robust"], "rank": [2, 8], "samples": [16, 64], "population": [100]},
                    {"scale": ["auto", "fixed"], "gamma": [4.0, 1024.0], "normalize": [False], "beta": [0, 1e-5]},
                    {"estimator": [{"name": "kfac", "output": "full"}, "ekfac"],
                     "solver": [{"name": "lanczos", "tolerance": 1e-4}]},
                    {"baseline": ["default", "eva"], "rank": [4]},
                ],
            },
            {
                "run": {**RUN, "finetune": {"steps": 9, "learning_rates": [1e-3], "eval_steps": [9]},
                        "source": {"data": "s.jsonl", "prompt_template": "{text}", "held_out": 5}},
                "grid": [
                    {"regularizer": ["none", {"name": "laplace", "strength": 3.0}], "source_fisher": ["ekfac", "kfac"]},
                    {"trainer": ["riemannion", {"name": "rac_lora", "every": 3}], "preset": ["lora_one"]},
                    {"baseline": ["default"], "regularizer": ["laplace"], "trainer": ["none", "odelora"]},
                ],
            },
        ],
        ids=lambda grid: grid.stem if isinstance(grid, Path) else f"with {len(grid['run'])} settings",
    )  # fmt: skip
    def test_the_grid_of_a_report_has_the_same_cells(self, grid, monkeypatch):
        monkeypatch.setitem(NEEDED_MODULES, "corda", ("", ""))
        made = read_grid(grid) if isinstance(grid, Path) else make_grid(grid)
        again = make_grid(tomllib.loads(provenance.grid_of(entry_of(made))))
        assert again.run == made.run
        assert {cell.id for cell in again.cells} == {cell.id for cell in made.cells}

    def test_only_cells_of_the_same_model_data_and_finetune_are_shown(self):
        now = make_grid({"run": {**RUN, "seeds": [1]}, "grid": {"rank": [2]}})
        same = make_grid({"run": {**RUN, "seeds": [0], "samples": 8}, "grid": {"rank": [2]}})
        other = make_grid({"run": {**RUN, "lora_alpha": 1.0}, "grid": {"rank": [2]}})
        content = {**entry_of(now), "earlier": [entry_of(other), entry_of(same)]}
        records = [record for grid in (other, same, now) for record in records_of(grid)]
        parts = {part.title: part for part in sections(records, now.run, content)}
        told = dict(parts["What was run"].facts)
        assert told["Cells"].startswith("2: 2 done, 0 failed; 1 more in the directory") and told["Seeds"] == "0, 1"
        assert len(parts["Cost and fidelity"].table.rows) == 2

    def test_other_versions_and_machines_are_said(self):
        grid = make_grid({"run": RUN, "grid": {"rank": [2]}})
        gpu = {"device": "H200", "threads": 8, "platform": "p"}
        earlier = [entry_of(grid) | {"versions": {"torch": "1"}, "machine": gpu}, entry_of(grid), {"run": {}}]
        content = {**entry_of(grid), "earlier": earlier}
        told = dict(sections(records_of(grid), grid.run, content)[0].facts)
        assert told["Versions"] == "torch 2; some cells are of runs with other versions (run.json, earlier)"
        assert told["Machine"] == "cpu, 1 threads, p; H200, 8 threads, p"
        assert told["Model"] == "m, 1,234,567 parameters, fingerprint abababababab, dtype auto"

    def test_a_run_without_a_finished_cell_says_what_failed(self):
        grid = make_grid({"run": {**RUN, "compare_to": "eva"}, "grid": {"rank": [2]}})
        parts = sections(records_of(grid, status="failed", error="no <room>"), grid.run, entry_of(grid))
        assert [part.title for part in parts] == [
            "What was run", "Paired differences", "What failed", "How to reproduce",
        ]  # fmt: skip
        assert "| no \\<room> |" in markdown("t", parts) and "no &lt;room&gt;" in page("t", parts)

    def test_a_missing_reference_is_said(self):
        grid = make_grid({"run": RUN, "grid": {"rank": [2]}})
        records = records_of(grid, angle=None, reference=None, reference_error="no room.")
        costs = next(part for part in sections(records, grid.run) if part.title == "Cost and fidelity")
        assert "1 cells have no angle: no room." in costs.text and not costs.pictures


class TestPage:
    EVIL = '<img src="http://example.org/x.png"> | a'

    @pytest.fixture
    def parts(self):
        columns = (Column("name", kind="text"), Column("0", "loss"), Column("5", "loss"), Column("why", kind="prose"))
        rows = ((Cell(self.EVIL), Cell("1"), Cell("2 ▼", "better"), Cell("because")),)
        return [
            Section(self.EVIL, self.EVIL, ((self.EVIL, self.EVIL),), (Picture("p", self.EVIL, b"\x89PNG"),)),
            Section("Table", table=Table(columns, rows), code=("grid.toml", f"# {self.EVIL}")),
        ]

    def test_it_is_well_formed_and_what_it_quotes_stays_text(self, parts):
        opened, seen, texts = [], [], []

        class Reader(HTMLParser):
            def handle_starttag(self, tag, attrs):
                seen.append((tag, dict(attrs)))
                if tag not in ("meta", "img"):
                    opened.append(tag)

            def handle_endtag(self, tag):
                assert opened.pop() == tag

            def handle_data(self, data):
                texts.append(data)

        Reader().feed(page(self.EVIL, parts))
        assert not opened
        assert [attrs["src"][:22] for tag, attrs in seen if tag == "img"] == ["data:image/png;base64,"]
        assert sum(self.EVIL in text for text in texts) == 8
        policy = next(attrs["content"] for tag, attrs in seen if attrs.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; img-src data:;")

    def test_groups_of_columns_span_them(self, parts):
        text = page("t", parts)
        assert '<th class="text" rowspan="2">name</th><th colspan="2">loss</th>' in text
        assert "<tr><th>0</th><th>5</th></tr>" in text
        assert '<td class="better">2 ▼</td><td class="prose">because</td>' in text

    def test_markdown_rows_have_as_many_cells_as_the_head(self, parts):
        text = markdown(self.EVIL, parts)
        rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
        assert [row.count("|") for row in rows] == [5, 5, 5]
        assert rows[0] == "| name | loss, 0 | loss, 5 | why |"
        assert "![" in text and "](pictures/p.png)" in text
