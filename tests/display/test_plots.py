"""The plots of a run and of several: they draw whatever there is, at round ticks, in aligned panels."""

import io

import numpy as np
import pytest
import xarray as xr

from dask_isgd.display import plots, smoothing
from dask_isgd.display.comparison import plot_runs


def history(n, **changed):
    rng = np.random.default_rng(0)
    step = np.arange(1, n + 1) * 20.0
    columns = {
        "loss": 2 * np.exp(-step / 900) + 0.1 + 0.01 * rng.random(n),
        "variance_ideal": 1 + rng.random(n),
        "variance_stale": 2 + rng.random(n),
        "variance_uniform": 4 + rng.random(n),
        "gain": 2 + 0.1 * rng.random(n),
        "gate": (step > 200).astype(float),
        "mean_age": 30 + rng.random(n),
        "ess_fraction": 0.5 + 0.1 * rng.random(n),
        **changed,
    }
    return xr.Dataset({k: ("report", v) for k, v in columns.items()}, coords={"step": ("report", step)})


EVALUATIONS = xr.Dataset({"error": ("report", [0.9, 0.1, 0.12])}, coords={"step": ("report", [0.0, 640.0, 1280.0])})
NAN = np.full(30, np.nan)


class TestPlot:
    @pytest.mark.parametrize(
        ("reports", "evaluations"),
        [
            (history(400), EVALUATIONS),
            (history(30), None),
            (history(1), EVALUATIONS),
            (history(0), EVALUATIONS.isel(report=slice(0))),
            (None, None),
            (xr.Dataset(), xr.Dataset()),
            (history(30, loss=NAN, gain=NAN, variance_ideal=NAN, variance_stale=NAN, variance_uniform=NAN), None),
            (history(30, variance_ideal=np.full(30, -1.0), loss=np.zeros(30)), EVALUATIONS),
            (history(30, mean_age=NAN, ess_fraction=NAN).drop_vars("gate"), EVALUATIONS),
        ],
        ids=["long", "short", "one", "none", "None", "empty", "uniform", "negative", "no weights"],
    )
    @pytest.mark.parametrize("kind", ["png", "svg"])
    def test_draws_whatever_there_is(self, reports, evaluations, kind):
        file = io.BytesIO()
        plots.plot(reports, evaluations, "a <title> $5 $\\frac$ _$").savefig(file, format=kind)
        assert len(file.getvalue()) > 5_000

    def test_panels_state_what_is_missing(self):
        texts = [text.get_text() for axes in plots.plot(None).axes for text in axes.texts]
        assert texts == ["no report yet", "no evaluation yet", "no norms yet", "no report yet", "no weights"]

    def test_without_classes_the_loss_replaces_the_error(self):
        evaluated = EVALUATIONS.assign(error=("report", [np.nan] * 3), loss=("report", [3.0, 2.0, 1.0]))
        axes = plots.plot(history(400), evaluated).axes[1]
        assert axes.get_title(loc="left") == "Validation loss"
        assert axes.lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]

    @pytest.mark.parametrize("without", ["", "error", "loss"])
    def test_several_runs_in_each_panel(self, without):
        evaluated = EVALUATIONS.assign(loss=("report", [3.0, 2.0, 1.0])).reset_coords()
        if without == "error":
            evaluated = evaluated.assign(error=("report", [np.nan] * 3))
        reports = history(30).reset_coords().assign(seconds=("report", np.arange(30.0)))
        if without == "loss":
            reports = reports.isel(report=slice(0))
        figure = plot_runs({"one": (reports, evaluated), "two": (reports, evaluated)})
        figure.savefig(io.BytesIO())
        assert [len(axes.lines) for axes in figure.axes] == [2] * 4
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
        title = figure.axes[2].get_title(loc="left")
        assert title == f"Validation {'loss' if without == 'error' else 'error'}, by steps"

    def test_shows_itself_in_a_notebook(self):
        assert plots.plot(None)._repr_png_().startswith(b"\x89PNG")

    def test_the_plot_shows_the_numbers(self):
        figure = plots.plot(history(400), EVALUATIONS)
        loss, error, variance, gain, *_ = figure.axes
        np.testing.assert_array_equal(loss.lines[0].get_ydata(), history(400)["loss"])
        assert "best 10.00 % at step 640" in error.texts[0].get_text()
        assert {line.get_label() for line in variance.lines if not line.get_label().startswith("_")} == {
            "uniform",
            "as drawn",
            "ideal",
        }
        uniform = next(line for line in variance.lines if line.get_label() == "uniform").get_ydata()
        assert np.all((uniform > 2.0) & (uniform < np.sqrt(5.0)))  # a root, not a trace
        shades = [patch.get_bbox() for patch in gain.patches]
        assert [(box.x0, box.x1) for box in shades] == [(0.0, 220.0)]

    def test_the_panels_of_a_column_have_the_same_edges(self):
        figure = plots.plot(history(400), EVALUATIONS)
        figure.draw_without_rendering()
        edges = [(round(axes.get_position().x0, 6), round(axes.get_position().x1, 6)) for axes in figure.axes]
        loss, error, variance, gain, age, _ = edges
        assert loss == variance
        assert error == gain == age

    @pytest.mark.parametrize("reports", [3, 61, 400])
    @pytest.mark.parametrize("scale", [1e-4, 700.0])
    def test_ticks_are_round_and_their_labels_differ(self, reports, scale):
        data = history(reports)
        data = data.assign(
            {name: scale * data[name] for name in ("loss", "variance_uniform", "variance_ideal", "gain")}
        )
        figure = plots.plot(data, EVALUATIONS)
        figure.draw_without_rendering()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                shown = [place for place in axis.get_majorticklocs() if low <= place <= high]
                labels = axis.get_major_formatter().format_ticks(shown)
                assert len(set(labels)) == len(labels) <= 8, labels
                for place in shown:
                    digits = f"{place:.9f}".replace(".", "").strip("-0")
                    assert len(digits) <= 3, digits

    def test_leaves_pyplot_alone(self):
        import subprocess
        import sys

        code = "import sys, dask_isgd.display.plots as p; p.plot(None); assert 'matplotlib.pyplot' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestSmooth:
    def test_against_a_loop(self):
        values = np.random.default_rng(0).random(40)
        values[[3, 17, 18]] = np.nan
        smoothed = smoothing.smooth(values, 9)
        for i in range(40):
            half = min(4, i, 39 - i)
            wanted = np.nan if np.isnan(values[i]) else np.nanmean(values[i - half : i + half + 1])
            np.testing.assert_allclose(smoothed[i], wanted, atol=1e-12)

    def test_keeps_a_line(self):
        np.testing.assert_allclose(smoothing.smooth(np.arange(20.0), 7), np.arange(20.0))

    def test_nothing(self):
        assert smoothing.smooth(np.zeros(0), 5).shape == (0,)
