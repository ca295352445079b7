"""Every plot draws into the Axes it is given, and shows what the frames hold."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

import kvmtrace
from kvmtrace import plots

FIXTURES = Path(__file__).parents[1] / "fixtures"
PLOTS = [plots.plot_budget, plots.plot_latency, plots.plot_exit_rate, plots.plot_latency_over_time, plots.plot_timeline]


@pytest.fixture(scope="module")
def rec() -> kvmtrace.LoadedRecording:
    return kvmtrace.load(FIXTURES / "svm-6.1-lifecycle.dat")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_plot_uses_the_axes_it_is_given(plot, rec: kvmtrace.LoadedRecording) -> None:
    _, ax = plt.subplots()
    assert plot(rec, ax=ax) is ax
    assert ax.has_data()


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_plot_makes_axes_of_its_own(plot, rec: kvmtrace.LoadedRecording) -> None:
    plot(rec).figure.canvas.draw()


def test_latency_curve_ends_at_its_maximum(rec: kvmtrace.LoadedRecording) -> None:
    ax = plots.plot_latency(rec, ["cpuid"])
    line = ax.lines[0]
    own = rec.vm_exits[rec.vm_exits["name"] == "cpuid"]["dur_ns"].dropna()
    assert line.get_xdata()[-1] == own.max()
    assert line.get_ydata()[-1] == 100


def test_budget_bars_reach_100_percent(rec: kvmtrace.LoadedRecording) -> None:
    ax = plots.plot_budget(rec)
    assert max(bar.get_x() + bar.get_width() for bar in ax.patches) == pytest.approx(100)


def test_around_an_exit_without_an_end(rec: kvmtrace.LoadedRecording) -> None:
    plots.plot_around_exit(rec, rec.vm_exits.index[-1])


def test_the_timeline_of_many_slices_is_drawn_in_bins(rec: kvmtrace.LoadedRecording, monkeypatch) -> None:
    few = plots.shares_over_time
    monkeypatch.setattr(plots, "shares_over_time", lambda *args: few(*args, max_slices=10))
    ax = plots.plot_timeline(rec)
    ax.figure.canvas.draw()
    assert {text.get_text() for text in ax.get_legend().get_texts()} >= {"guest", "kernel"}
    assert len(ax.collections) < 20
