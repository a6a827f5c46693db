"""Plots of a benchmark's JSON: acceptance by position, speed-up, threshold sweep, reliability; labels at the lines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark import PLAIN, STOCK_LOOP

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_BLUE, _ORANGE = _COLOURS[:2]
_LIGHT_GREY, _GREY, _INK = "#C9C9C9", "#808080", "#333333"
_LINE_OF_TEXT = 0.055  # height of a label, as a share of the axis


def plot_benchmark(result: Mapping[str, Any], folder: str | Path, *, stem: str = "bench") -> list[Path]:
    """Write a PNG `{stem}_{plot}.png` for everything that `result` holds; returns their paths.

    Raises ValueError where it holds nothing to plot, and ImportError without matplotlib.
    """
    plots: dict[str, tuple[bool, Callable]] = {
        "acceptance": (bool(_acceptances(result)), _plot_acceptance),
        "speed": (bool(result.get("arms")), _plot_speed),
        "threshold_sweep": (bool(result.get("threshold_sweep")), _plot_threshold_sweep),
        "reliability": (bool(result.get("reliability")), _plot_reliability),
    }
    wanted = {name: draw for name, (is_there, draw) in plots.items() if is_there}
    if not wanted:
        raise ValueError("Nothing to plot: the file has none of `arms`, `threshold_sweep` and `reliability`.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in wanted.items():
        figure, axes = _figure(height=1.6 + 0.45 * len(result["arms"]) if name == "speed" else 4.2)
        draw(axes, result)
        paths.append(folder / f"{stem}_{name}.png")
        figure.savefig(paths[-1], dpi=160)
    return paths


def _figure(*, height: float):
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, and no state between two calls
    except ImportError:
        raise ImportError("Plots need matplotlib: pip install hf-dspark[eval]") from None
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    return figure, axes


def _acceptances(result: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Conditional acceptance of each draft in our loop; transformers' loop has the same drafts."""
    arms = result.get("arms", {}).items()
    return {name: arm["acceptance_at"] for name, arm in arms if arm["acceptance_at"] and not name.endswith(STOCK_LOOP)}


def _plot_acceptance(axes, result: Mapping[str, Any]) -> None:
    lines = _acceptances(result)
    ends = {}
    for index, (name, rates) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [(k, rate) for k, rate in enumerate(rates, 1) if rate is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=2, clip_on=False)
        ends[f"{name}\ntau {result['arms'][name]['tau']:.2f}"] = (*points[-1], colour)
    positions = range(1, max(map(len, lines.values())) + 1)
    axes.set(xticks=positions, ylim=(0, 1.02), xlabel="position in the block")
    _title(axes, "Acceptance of a drafted token, given that all before it were accepted", result)
    _percent(axes.yaxis)
    _label_ends(axes, ends)


def _plot_speed(axes, result: Mapping[str, Any]) -> None:
    arms = {name: arm for name, arm in result["arms"].items() if name != PLAIN}
    names = list(arms)[::-1]  # the first at the top
    ratios = [arms[name]["ratio_to_plain"] for name in names]
    medians = [ratio["median"] for ratio in ratios]
    whiskers = [[r["median"] - r["p25"] for r in ratios], [r["p75"] - r["median"] for r in ratios]]
    colours = [_GREY if arms[name]["acceptance_at"] is None else _BLUE for name in names]
    axes.barh(names, medians, height=0.6, color=colours)
    axes.axvline(1, color=_INK, linestyle="--", linewidth=1)
    axes.errorbar(medians, names, xerr=whiskers, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=4)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the dashed line does not run through the text
    for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        text = f"{ratio['median']:.2f}x, tau {arms[name]['tau']:.2f}"
        place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (ratio["p75"], row), color=_INK, bbox=paper, **place)
    axes.text(1, len(names) - 0.55, "plain generate()", ha="center", va="bottom", fontsize=9, color=_INK, bbox=paper)
    axes.set(xlim=(0, 1.35 * max(1, *(r["p75"] for r in ratios))), ylim=(-0.5, len(names) - 0.1))
    axes.set_xlabel("times plain generate(): median of the prompts, p25 to p75")
    axes.tick_params(axis="y", length=0)
    _title(axes, "Tokens per second", result)


def _plot_threshold_sweep(axes, result: Mapping[str, Any]) -> None:
    sweep = result["threshold_sweep"]
    places = range(len(sweep))
    accepted, rejected = [row["accepted"] for row in sweep], [row["rejected"] for row in sweep]
    totals = [a + r for a, r in zip(accepted, rejected, strict=True)]
    axes.bar(places, accepted, color=_BLUE, width=0.7)
    axes.bar(places, rejected, bottom=accepted, color=_LIGHT_GREY, width=0.7)
    axes.set(xticks=places, xticklabels=[f"{row['threshold']:.1f}" for row in sweep])
    axes.set(xlabel="confidence threshold", ylabel="verified drafted tokens")
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= max(totals)])
    axes.set_ylim(0, 2 * max(1, *totals))  # the rates run in a band above the bars
    last = len(sweep) - 0.75
    labels = {
        "accepted": (last, accepted[-1] / 2, _BLUE),
        "rejected": (last, accepted[-1] + rejected[-1] / 2, _GREY),
    }
    _label_ends(axes, labels)
    rate_axis = axes.twinx()
    rate_axis.spines[["top", "left", "right"]].set_visible(False)
    points = [(x, a / total) for x, a, total in zip(places, accepted, totals, strict=True) if total]
    rate_axis.plot(*zip(*points, strict=True), color=_ORANGE, marker="o", linewidth=2)
    for x, rate in points:
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        rate_axis.annotate(f"{rate:.0%}", (x, rate), fontsize=9, color=_ORANGE, **above)
    rate_axis.set(ylim=(-1.35, 1.15), yticks=[])
    _label_ends(rate_axis, {"share\naccepted": (last, points[-1][1], _ORANGE)})
    _title(axes, "Verifying only what the draft is confident of", result)


def _plot_reliability(axes, result: Mapping[str, Any]) -> None:
    reliability = result["reliability"]
    bins = reliability["bins"]
    if len(bins) == len(reliability["before"]) + 1:  # edges
        bins = [(low + high) / 2 for low, high in zip(bins, bins[1:], strict=False)]
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1)
    # Above the diagonal, where a draft that is too confident leaves room.
    axes.text(0.3, 0.37, "perfect", color=_GREY, fontsize=9, rotation=45, ha="center", va="center")
    labels = {}
    for when, colour in (("before", _ORANGE), ("after", _BLUE)):
        rates = zip(bins, reliability[when], strict=True)
        points = [(x, rate) for x, rate in rates if rate is not None and rate == rate]  # empty bins: None or NaN
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=2)
        labels[f"{when} calibration\nECE {reliability[f'ece_{when}']:.1%}"] = (1, points[-1][1], colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="predicted", ylabel="accepted")
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    _title(axes, "Predicted survival, and how often it came true", result)
    _label_ends(axes, labels)


def _title(axes, text: str, result: Mapping[str, Any]) -> None:
    """What is shown, and below it on what it was measured, as far as the file says so."""
    prompts = result.get("prompts")
    facts = [f"{prompts['number']} prompts of {prompts['file']}"] if prompts else []
    facts += [str(result[name]) for name in ("dtype", "device") if result.get(name)]
    axes.set_title(text, loc="left", fontsize=11, color=_INK, pad=22 if facts else 8)
    axes.text(0, 1.02, ", ".join(facts), transform=axes.transAxes, fontsize=8, color=_INK, va="bottom")


def _percent(axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _label_ends(axes, ends: Mapping[str, Sequence[Any]]) -> None:
    """Write each label to the right of its line's end (x, y, colour), moved apart where they would overlap."""
    low, high = axes.get_ylim()
    edge = low
    for text, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = _LINE_OF_TEXT * (high - low) * len(text.splitlines())
        y = max(y, edge + height / 2)
        edge = y + height / 2
        place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), color=colour, fontsize=9, **place)
