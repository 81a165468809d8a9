import math
import random
from dataclasses import replace

import pytest
from matplotlib.image import imread
from rich.console import Console
from rich.table import Table

from lora_da_core.display import abbreviate, number
from lora_da_core.errors import StorageError
from lora_da_core.report import group_table, layer_table, plot_spectra, plugin_table, totals
from lora_da_core.types import LayerReport, RunReport

MODULES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


def layer(name="model.layers.0.self_attn.q_proj", **changes):
    values = {
        "name": name,
        "in_features": 576,
        "out_features": 192,
        "rank": 4,
        "tokens": 12345,
        "sigma": 0.5,
        "ritz_values": (-0.97, -0.031, -0.0042, 1e-5),
        "gap": 2.5e-4,
        "residual": 3e-9,
        "converged": True,
        "solver": "eigh",
        "applies": 3,
        "damping": {"Z": 3.1e-3, "Y": 1.2e-9},
        "remedies": (),
        "gradient": {},
        "seconds": 1.25,
        "digest_A": "a" * 64,
        "digest_B": "b" * 64,
    }
    return LayerReport(**{**values, **changes})


def report_of(*layers):
    return RunReport(
        layers=layers,
        components={"estimator": "kfac", "gradient": "full", "objective": "causal_lm", "solver": "auto"},
        options={},
        config={},
        samples=256,
        label_tokens=34567,
        loss=1.4483,
        scale={"multiplier": 3.25, "tried": [[1.0, 1.2]] * 9},
        seconds={"statistics": 12.3, "solve": 80.2},
        notes=("columns question/answer.",),
        versions={},
        base="f",
    )


def big_report(blocks=30):
    source = random.Random(0)
    layers = [
        layer(
            f"model.layers.{block}.{name}",
            in_features=sizes[0],
            out_features=sizes[1],
            sigma=10 ** source.uniform(-3, 2),
            ritz_values=tuple(sorted(-(10 ** (-place * source.uniform(0.2, 0.5))) for place in range(8))),
            residual=10 ** source.uniform(-14, -7),
        )
        for block in range(blocks)
        for name, sizes in MODULES.items()
    ]
    return report_of(*layers)


def text_of(table, width=80):
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def rows_of(table: Table):
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


def test_layer_table_fits_eighty_columns_with_a_line_per_layer():
    report = big_report(blocks=13)
    text = text_of(layer_table(report))
    body = [line for line in text.splitlines() if "×" in line and "✓" in line]
    assert len(body) == 13 * 7
    assert "…\n" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert [line.split()[0] for line in body[5:9]] == ["0.mlp.up_proj", "0.mlp.down_proj", "1.…q_proj", "1.…k_proj"]
    assert body[0].split()[-3:] == ["✓", "0.003/1e-9", "1.2"]


def test_layer_table_holds_the_values():
    (cells,) = rows_of(layer_table(report_of(layer())))
    assert [str(cell) for cell in cells] == [
        "model.…q_proj", "576×192", "4", "0.5", "-0.97", "1e-5", "2.5e-4", "3e-9", "✓", "0.003/1e-9",
        "1.2",
    ]  # fmt: skip


def test_wide_table_shows_full_names_and_more_ritz_values():
    table = layer_table(big_report(blocks=2), wide=True)
    text = text_of(table, width=130)
    assert "model.layers.1.self_attn.k_proj" in text
    assert [str(column.header) for column in table.columns][4:8] == ["λ1", "λ2", "λ3", "λr"]
    assert all(len(line) <= 130 for line in text.splitlines())
    (cells,) = rows_of(layer_table(report_of(layer()), wide=True))
    assert list(cells[4:8]) == ["-0.97", "-0.031", "-0.0042", "1e-5"]


def test_unknown_values_and_missing_ritz_values_are_dashes():
    (cells,) = rows_of(layer_table(report_of(layer(gap=math.nan, ritz_values=(-0.5,))), wide=True))
    assert list(cells[4:9]) == ["-0.5", "–", "–", "-0.5", "–"]


def test_layer_that_missed_its_tolerance_is_marked():
    table = layer_table(report_of(layer(), layer("model.layers.1.mlp.up_proj", converged=False)))
    assert [str(cell) for cell in table.columns[8].cells] == ["✓", "✗"]
    assert [row.style for row in table.rows] == ["", "bold red"]


def test_names_in_brackets_are_not_markup():
    assert "blocks[0].proj" in text_of(layer_table(report_of(layer("blocks[0].proj"))))


def test_different_damping_keys_share_one_column():
    table = layer_table(report_of(layer(damping={"Z": 0.01}), layer("b", damping={"lambda": 1.0})))
    assert str(table.columns[9].header) == "damping\nZ/lambda"
    assert list(table.columns[9].cells) == ["0.01/–", "–/1"]


@pytest.mark.parametrize("width", [12, 16, 20])
def test_abbreviated_names_stay_apart(width):
    names = [f"model.layers.{block}.{part}" for block in range(40) for part in [*MODULES, "cross_attn.q_proj"]]
    short = abbreviate(names, width)
    assert len(set(short)) == len(names)


def test_abbreviate_keeps_what_fits_and_cuts_in_the_middle():
    names = ["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.up_proj"]
    assert abbreviate(names, 40) == ["3.self_attn.q_proj", "12.mlp.up_proj"]
    assert abbreviate(names, 10) == ["3.…q_proj", "12.…up_proj"]
    assert abbreviate(names[:1], 60) == names[:1]


@pytest.mark.parametrize("value", [1e-12, 0.00099, 0.001, 0.5, 9.99, 99.6, 1234.0, 9999.0, 10000.0, 3e38, -7.77e-5])
def test_number_is_short_and_right(value):
    text = number(value)
    assert float(text) == pytest.approx(value, rel=0.051)
    assert len(text.lstrip("-")) <= 7


def test_number_of_what_is_not_finite():
    assert [number(math.nan), number(math.inf), number(-math.inf)] == ["–", "∞", "-∞"]


def test_group_table_sums_up_kinds():
    report = report_of(
        layer("m.0.q", sigma=1.0, residual=1e-9, seconds=1.0, gap=math.nan),
        layer("m.1.q", sigma=3.0, residual=1e-7, seconds=2.0, gap=math.nan, converged=False),
        layer("m.0.k", out_features=64, gap=0.5),
    )
    table = group_table(report)
    first, second = ([str(cell) for cell in row] for row in rows_of(table))
    assert first == ["q", "2", "576×192", "4", "2", "-0.97", "–", "1e-7", "1/2", "3"]
    assert second[:3] == ["k", "1", "576×64"] and second[6] == "0.5"
    assert table.rows[0].style == "bold red"
    assert all(len(line) <= 80 for line in text_of(group_table(big_report())).splitlines())


def test_totals_count_and_name_what_went_wrong():
    missed = layer("model.layers.1.mlp.up_proj", converged=False, residual=0.02)
    mended = layer("model.layers.2.mlp.up_proj", remedies=("float64 Cholesky",), solver="lanczos")
    text = " ".join(text_of(totals(report_of(layer(), missed, mended)), width=300).split())
    assert f"3, {3 * 4 * (576 + 192):,} adapter parameters" in text
    assert "256 samples, 34,567 labels, mean loss 1.448" in text
    assert "eigh, lanczos; 2 of 3 converged, largest relative residual 0.02" in text
    assert "multiplier 3.25, tried 9 times" in text
    assert "statistics 12.3, solve 80.2; 92.5 in all" in text
    assert "not converged model.layers.1.mlp.up_proj" in text
    assert "in 1 layers: float64 Cholesky" in text


@pytest.mark.parametrize(
    ("multiplier", "said"),
    [(0.5, "multiplier 0.5, loss 1.534 to 1.003, tried 2 times"), (0.0, "loss 1.534 which no step surely lowers")],
)
def test_totals_say_what_became_of_the_loss(multiplier, said):
    scale = {
        "multiplier": multiplier,
        "base_loss": 1.5339,
        "tried": [[1.0, 1.7], [0.5, 1.0033]],
        "standard_error": 0.04,
    }
    text = text_of(totals(replace(report_of(layer()), scale=scale)), width=300)
    assert said in " ".join(text.split()) and "standard error 0.04" in text


@pytest.mark.parametrize("tried", [[1.0], [[]], [["a", "b"]], "x", None, [[0.5]], [[0.5, "b"]], {}])
def test_totals_bear_odd_scales(tried):
    scale = {"base_loss": 1.0, "multiplier": 0.5, "tried": tried}
    assert "scale" in text_of(totals(replace(report_of(layer()), scale=scale)))


def test_totals_do_not_mention_what_did_not_happen():
    text = text_of(totals(report_of(layer())))
    assert "not converged" not in text and "remedies" not in text


def test_plugin_table_shows_reasons():
    record = {"kind": "plugin", "name": "acme", "distribution": "acme-x", "version": "0.1"}
    text = text_of(plugin_table([{**record, "status": "failed", "reason": "ImportError: no [triton]"}]))
    assert "ImportError: no [triton]" in " ".join(text.split())


def test_plot_of_210_layers_is_a_picture_with_one_line_per_layer(tmp_path):
    from lora_da_core.spectra import spectra_figure

    report = big_report()
    plot_spectra(report, tmp_path / "spectra.png")
    picture = imread(tmp_path / "spectra.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 800 and picture.std() > 0.05
    axes = spectra_figure(report).axes
    panels = [entry for entry in axes if entry.get_title()]
    assert [entry.get_title() for entry in panels] == [f"{name.split('.')[-1]} (30)" for name in MODULES]
    assert sum(len(entry.lines) for entry in panels) == 210
    assert {entry.get_yscale() for entry in panels} == {"log"}
    line = panels[0].lines[0]
    assert list(line.get_ydata()) == [abs(value) for value in report.layers[0].ritz_values]


def test_plot_is_reproducible_and_leaves_matplotlib_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    for name in ("one.png", "two.png"):
        plot_spectra(big_report(blocks=2), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([layer()], id="one layer"),
        pytest.param([layer(residual=0.0, ritz_values=(0.0, 0.0))], id="zeros"),
        pytest.param([layer(residual=math.nan, converged=False, ritz_values=(math.nan, -1.0))], id="nan"),
        pytest.param([layer(f"net.{kind}.w{kind}") for kind in range(12)], id="twelve kinds"),
        pytest.param([layer("lm_head"), layer("embed", residual=math.inf, converged=False)], id="no depth"),
    ],
)
def test_plot_of_odd_reports(tmp_path, layers):
    plot_spectra(report_of(*layers), tmp_path / "spectra.png")
    assert imread(tmp_path / "spectra.png").std() > 0


def test_plot_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(StorageError, match="no layer"):
        plot_spectra(report_of(), tmp_path / "spectra.png")
    with pytest.raises(StorageError, match=r"cannot write the picture .*No such file"):
        plot_spectra(report_of(layer()), tmp_path / "missing" / "spectra.png")


def test_positive_ritz_values_are_marked():
    from lora_da_core.spectra import spectra_figure

    def marks(report):
        (panel,) = [entry for entry in spectra_figure(report).axes if entry.get_title()]
        return [list(line.get_xdata()) for line in panel.lines if line.get_marker() == "o" and len(line.get_xdata())]

    assert marks(report_of(layer())) == [[4]]
    assert marks(report_of(replace(layer(), ritz_values=(-1.0, -0.5)))) == []
