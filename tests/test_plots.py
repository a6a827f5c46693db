"""hf-dspark plot: what a benchmark's JSON holds becomes a PNG each, readable without a legend."""

import json
import sys

import pytest
from tiny_bench import bench_json

from hf_dspark.cli import main
from hf_dspark.eval import plots

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.image import imread

SWEEP = [{"threshold": step / 10, "accepted": 90 - 6 * step, "rejected": 180 - 20 * step} for step in range(9)]
RELIABILITY = {
    "bins": [0.1, 0.3, 0.5, 0.7, 0.9],
    "before": [0.05, 0.2, 0.35, 0.5, 0.8],
    "after": [0.1, 0.31, 0.48, None, float("nan")],
    "ece_before": 0.0834,
    "ece_after": 0.0112,
}


def _two_drafts():
    result, other = bench_json(), bench_json("other", tau=2.1)
    return {**result, "arms": {**result["arms"], "other": other["arms"]["other"]}}


def _draw(draw, result):
    """The axes that `draw` makes of `result`, those it adds among them."""
    figure, axes = plots._figure(height=4)
    draw(axes, result)
    figure.canvas.draw()
    return figure.axes


def _texts(axes):
    return {text.get_text(): text for text in axes.texts}


def test_command_writes_a_png_for_everything_the_file_holds(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**_two_drafts(), "threshold_sweep": SWEEP, "reliability": RELIABILITY}))
    assert main(["plot", str(file), "--output", str(tmp_path / "new" / "plots")]) == 0
    paths = capsys.readouterr().out.splitlines()
    names = ["run_acceptance.png", "run_speed.png", "run_threshold_sweep.png", "run_reliability.png"]
    assert paths == [str(tmp_path / "new" / "plots" / name) for name in names]
    for path in paths:
        image = imread(path)
        assert image.shape[1] > 1000
        assert len({tuple(pixel) for pixel in image[::7, ::7].reshape(-1, image.shape[2])}) > 4
        assert 0.005 < (image[..., :3].min(-1) < 0.9).mean() < 0.5  # neither blank nor filled


def test_benchmark_alone_gives_two_plots_beside_its_file(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(bench_json()))
    assert main(["plot", str(tmp_path / "bench.json")]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"bench_acceptance.png", "bench_speed.png"}


def test_reliability_alone_is_plotted_without_a_benchmark(tmp_path):
    (path,) = plots.plot_benchmark({"reliability": RELIABILITY}, tmp_path)
    assert path.name == "bench_reliability.png"


def test_acceptance_has_one_line_a_draft_with_its_name_at_its_end_in_its_colour():
    (axes,) = _draw(plots._plot_acceptance, _two_drafts())
    assert len(axes.lines) == 2  # transformers' loop has the same draft
    labels = _texts(axes)
    for line, label in zip(axes.lines, ("tiny_draft\ntau 3.22", "other\ntau 2.10"), strict=True):
        assert line.get_ydata().tolist() == [0.8312, 0.7123]  # nothing was counted at the third
        assert labels[label].get_color() == line.get_color()
        assert labels[label].xy[0] == line.get_xdata()[-1]
    assert axes.get_legend() is None


def test_labels_of_lines_that_end_together_do_not_overlap():
    (axes,) = _draw(plots._plot_acceptance, _two_drafts())
    boxes = [_texts(axes)[label].get_window_extent() for label in ("tiny_draft\ntau 3.22", "other\ntau 2.10")]
    assert not boxes[0].overlaps(boxes[1])


def test_speed_has_a_bar_an_arm_with_its_median_and_whiskers_from_p25_to_p75():
    (axes,) = _draw(plots._plot_speed, bench_json())
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "tiny_draft", "tiny_draft@transformers", "prompt_lookup",
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == [1.8431, 1.5119, 1.2178]
    (whiskers,) = axes.collections
    ends = [segment[:, 0].tolist() for segment in whiskers.get_segments()]
    assert ends == [pytest.approx([0.9 * median, 1.1 * median]) for median in (1.8431, 1.5119, 1.2178)]
    assert "1.84x, tau 3.22" in _texts(axes)
    assert "plain generate()" in _texts(axes)


def test_threshold_sweep_stacks_bars_below_the_line_of_the_accepted_share():
    bars, rates = _draw(plots._plot_threshold_sweep, {"threshold_sweep": SWEEP})
    assert [bar.get_height() for bar in bars.patches] == (
        [row["accepted"] for row in SWEEP] + [row["rejected"] for row in SWEEP]
    )
    assert [bar.get_y() for bar in bars.patches[9:]] == [row["accepted"] for row in SWEEP]
    shares = [row["accepted"] / (row["accepted"] + row["rejected"]) for row in SWEEP]
    assert rates.lines[0].get_ydata().tolist() == shares
    assert {"accepted", "rejected"} <= set(_texts(bars))
    assert {"33%", f"{shares[-1]:.0%}", "share\naccepted"} <= set(_texts(rates))


def test_sweep_where_nothing_is_verified_at_last_has_no_share_there():
    sweep = [*SWEEP[:-1], {"threshold": 0.8, "accepted": 0, "rejected": 0}]
    _, rates = _draw(plots._plot_threshold_sweep, {"threshold_sweep": sweep})
    assert rates.lines[0].get_xdata().tolist() == list(range(8))


def test_reliability_shows_both_curves_with_their_errors_and_skips_empty_bins():
    (axes,) = _draw(plots._plot_reliability, {"reliability": RELIABILITY})
    perfect, before, after = axes.lines
    assert list(perfect.get_ydata()) == list(perfect.get_xdata()) == [0, 1]
    assert before.get_xdata().tolist() == RELIABILITY["bins"]
    assert after.get_xdata().tolist() == RELIABILITY["bins"][:3]
    labels = _texts(axes)
    assert to_hex(labels["before calibration\nECE 8.3%"].get_color()) == to_hex(before.get_color())
    assert to_hex(labels["after calibration\nECE 1.1%"].get_color()) == to_hex(after.get_color())


def test_bins_may_be_edges():
    reliability = {**RELIABILITY, "bins": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}
    (axes,) = _draw(plots._plot_reliability, {"reliability": reliability})
    assert axes.lines[1].get_xdata().tolist() == pytest.approx(RELIABILITY["bins"])


def test_file_without_anything_to_plot_is_refused(tmp_path, capsys):
    (tmp_path / "empty.json").write_text('{"versions": {}}')
    assert main(["plot", str(tmp_path / "empty.json")]) == 2
    assert "none of `arms`, `threshold_sweep` and `reliability`" in capsys.readouterr().err


def test_missing_matplotlib_is_an_error_that_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.json").write_text(json.dumps(bench_json()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path / "bench.json")]) == 2
    assert "pip install hf-dspark[eval]" in capsys.readouterr().err
