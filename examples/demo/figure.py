"""The figure: both loss curves over steps and over seconds."""

from itertools import accumulate

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

COLOURS = {"peft": "#9aa0a6", "peftkern": "#d1495b"}
LABELS = {"peft": "PEFT", "peftkern": "PEFT + peftkern"}


def smoothed(losses, window):
    """Mean over the last `window` losses (fewer at the start)."""
    return [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


def draw(results, title, path):
    """Write a PNG of the curves of `results`, arm -> {"losses", "seconds"} with one entry per step, to `path`."""
    figure, (over_steps, over_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    window = max(1, len(next(iter(results.values()))["losses"]) // 12)
    for arm, result in results.items():
        losses, elapsed = result["losses"], list(accumulate(result["seconds"]))
        mean = smoothed(losses, window)
        # The second curve lies on the first, so it is drawn thin and dashed over a broad line.
        style = {"color": COLOURS[arm], "lw": 4.5 if arm == "peft" else 1.6, "ls": "-" if arm == "peft" else "--"}
        over_steps.plot(range(1, len(losses) + 1), losses, label=LABELS[arm], **style)
        over_time.plot(elapsed, losses, color=COLOURS[arm], lw=1, alpha=0.2)
        over_time.plot(elapsed, mean, color=COLOURS[arm], lw=2.4)
        over_time.plot(elapsed[-1], mean[-1], "o", color=COLOURS[arm], ms=7)
        last = arm == max(results, key=lambda name: sum(results[name]["seconds"]))
        over_time.annotate(
            f"{LABELS[arm]}\n{elapsed[-1]:.0f} s",
            (elapsed[-1], mean[-1]),
            # The longer run ends at the right edge: its label goes above the point, the other's beside it.
            xytext=(0, 14) if last else (10, 0),
            textcoords="offset points",
            ha="right" if last else "left",
            va="bottom" if last else "center",
            color="#5f6368" if arm == "peft" else COLOURS[arm],
            fontweight="bold",
            bbox={"fc": "white", "ec": "none", "alpha": 0.6, "pad": 1.5},
        )
    over_steps.set(xlabel="step", ylabel="training loss", title="step by step")
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.legend(frameon=False)
    over_time.set(xlabel="seconds of training", title=f"against the clock (bold: mean of {window} steps)")
    over_time.set_xlim(left=0)
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
