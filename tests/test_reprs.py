"""How pipelines, plans, results and reports show themselves: in a line, as tables, in pandas and as a picture."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.image import imread
from peft import LoraConfig

import lora_da_core
from conftest import make_batches, make_samples, make_tiny_llama
from lora_da_core import LoraDAConfig, OptionError

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def result() -> lora_da_core.LoraDAResult:
    pipeline = lora_da_core.build_pipeline(config=LoraDAConfig(scale="fixed"))
    return pipeline.run(make_tiny_llama(), make_batches(make_samples()), LORA)


class Cells(HTMLParser):
    """Checks that every element is closed, and keeps the text of the cells row by row."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_result_is_one_line_and_prints_as_a_few(result: lora_da_core.LoraDAResult) -> None:
    assert repr(result) == "<LoraDAResult: 4 layers, rank 2, 448 parameters, from 12 samples>"
    assert repr(result.report) == "<RunReport: 4 layers, rank 2, 448 parameters, from 12 samples>"
    lines = str(result).splitlines()
    assert lines[0] == "components: estimator kfac, gradient full, objective causal_lm, solver auto"
    assert [line.partition(":")[0] for line in lines] == [
        "components", "layers", "data", "solved by", "scale", "seconds",
    ]  # fmt: skip
    assert str(result.report) == str(result)


def test_the_parameters_are_those_of_the_adapter(result: lora_da_core.LoraDAResult) -> None:
    count = sum(factors.A.numel() + factors.B.numel() for factors in result.factors.values())
    assert f"{count:,} parameters" in repr(result)


def test_layers_that_missed_their_tolerance_are_counted(result: lora_da_core.LoraDAResult) -> None:
    first, *rest = result.report.layers
    report = replace(result.report, layers=(replace(first, converged=False), *rest))
    assert "1 not converged" in repr(report) and f"not converged: {first.name}" in str(report)


def test_a_notebook_gets_tables_whose_text_is_escaped(result: lora_da_core.LoraDAResult) -> None:
    report = replace(result.report, notes=("a <script> & more",))
    html = report._repr_html_()
    assert "<script>" not in html
    rows = Cells(html).rows
    assert ["note", "a <script> & more"] in rows
    assert [row[0] for row in rows[-2:]] == ["q_proj", "v_proj"] and rows[-1][1:4] == ["2", "32×16", "2"]
    assert replace(result, report=report)._repr_html_() == html


def test_a_pipeline_names_its_parts_and_what_was_changed() -> None:
    pipeline = lora_da_core.build_pipeline(
        estimator=("kfac", {"output": "full"}), solver="lanczos", config=LoraDAConfig(beta=0.5, seed=3)
    )
    assert repr(pipeline) == (
        "Pipeline(estimator='kfac', gradient='full', objective='causal_lm', solver='lanczos', "
        "config=LoraDAConfig(beta=0.5, seed=3))"
    )
    assert eval(repr(pipeline.config)) == pipeline.config
    rows = Cells(pipeline._repr_html_()).rows
    assert ["estimator", "kfac", "output='full', labels='empirical'"] in rows
    assert ["beta", "0.5", ""] in rows and ["alpha", "1.0", "default"] in rows


def test_estimates_do_not_print_the_model() -> None:
    pipeline = lora_da_core.build_pipeline()
    found = pipeline.estimate(make_tiny_llama(), make_batches(make_samples()), LORA)
    assert repr(found) == "<Estimates: 4 layers, 12 samples, by kfac and full>"


def test_a_plan_shows_its_peak_and_its_rows() -> None:
    pipeline = lora_da_core.build_pipeline()
    plan = lora_da_core.estimate_memory(make_tiny_llama(), LORA, pipeline=pipeline)
    assert repr(plan).startswith("<Plan: ") and repr(plan).endswith(" 1 pass, 4 layers>")
    rows = Cells(plan._repr_html_()).rows
    assert len(rows) == 3 + len(plan.rows) + len(plan.phases()) + len(plan.notes)
    assert ["passes", "over the data", "1"] in rows
    tight = lora_da_core.estimate_memory(make_tiny_llama(), LORA, pipeline=pipeline, max_memory=1000)
    assert "of 1000 B, too much" in repr(tight)


def test_pandas_has_a_row_per_layer_with_what_the_report_holds(result: lora_da_core.LoraDAResult) -> None:
    table = result.to_pandas()
    pd.testing.assert_frame_equal(table, result.report.to_pandas())
    layers = result.report.layers
    assert list(table.index) == [layer.name for layer in layers]
    for layer in layers:
        row = table.loc[layer.name]
        assert (row["ritz_1"], row["ritz_2"]) == layer.ritz_values
        assert {key: row[f"damping_{key}"] for key in layer.damping} == layer.damping
        assert (row["rank"], row["sigma"], row["digest_A"]) == (layer.rank, layer.sigma, layer.digest_A)
    assert table["converged"].dtype == bool and table.select_dtypes("number").shape[1] >= 10
    table.to_json()


def test_the_picture_shows_itself_and_saves(result: lora_da_core.LoraDAResult) -> None:
    figure = result.plot_spectra()
    picture = imread(io.BytesIO(figure._repr_png_()))  # type: ignore[attr-defined]
    assert picture.shape[1] > 700 and picture.std() > 0.05
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["q_proj (2)", "v_proj (2)"]
    drawn = panels[0].lines[0].get_ydata()
    assert list(drawn) == [abs(value) for value in result.report.layers[0].ritz_values]
    assert all(math.isfinite(value) for value in drawn)


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("matplotlib", "plot_spectra")])
def test_a_missing_package_is_named(
    package: str, method: str, result: lora_da_core.LoraDAResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "lora_da_core.spectra" or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=rf"^{method} needs {package} .*pip install {package}\.$"):
        getattr(result, method)()


def test_a_report_of_nothing_has_no_picture(result: lora_da_core.LoraDAResult) -> None:
    empty = replace(result.report, layers=())
    with pytest.raises(OptionError, match="holds no layer"):
        empty.plot_spectra()
    assert len(empty.to_pandas()) == 0
    assert repr(empty) == "<RunReport: 0 layers, rank none, 0 parameters, from 12 samples>"
