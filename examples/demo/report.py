"""What the terminal shows: the opening lines, the progress of an arm, the table and the verdict."""

from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .checks import Score

console = Console(highlight=False)
NAMES = {"peft": "PEFT", "peftkern": "PEFT + peftkern"}
COLOURS = {"peft": "grey62", "peftkern": "bold green"}
MARKS = {True: "[bold green]✓[/]", False: "[bold red]✗[/]", None: "[yellow]·[/]"}


def duration(seconds):
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def size(count):
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def opening(task, options, steps, device, trainable, total):
    """What is trained on what."""
    import torch

    title = {"peft": "PEFT", "peftkern": "PEFT + [bold]peftkern.accelerate(model)[/]"}
    title = title.get(options.arms, f"one training run, twice: {title['peft']}, then {title['peftkern']}")
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else device
    console.print(
        Panel(
            f"[bold]{task.title}[/], {total - trainable:,} frozen {options.dtype} parameters\n"
            f"[bold]{options.method.upper()} rank {options.rank}[/] on every linear layer, {trainable:,} parameters\n"
            f"{task.describe()}\n"
            f"{steps} steps of {task.batch}, seed {options.seed}, {threads}",
            title=title,
            title_align="left",
            box=box.ROUNDED,
            expand=False,
            padding=(0, 2),
        )
    )


def heading(arm, line):
    console.print(f"[{COLOURS[arm]}]{NAMES[arm]}[/]: {line}")


def shown_score(score):
    return str(Score(**score))


@contextmanager
def progress(arm, steps):
    """A progress bar over `steps`; yields the callback for train.train."""
    with Progress(
        TextColumn("  "),
        BarColumn(bar_width=36, complete_style=COLOURS[arm], finished_style=COLOURS[arm]),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[pace]} a step "),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        shown = bar.add_task("", total=steps, loss="  -   ", pace="-")

        def on_step(step, loss, seconds):
            bar.update(shown, completed=step + 1, loss=f"{loss:.4f}", pace=duration(seconds))
            # The first step pays for warming up, so the second gives the estimate.
            if step == 1 and steps > 2:
                left = duration(seconds * (steps - 2))
                bar.console.print(f"   [dim]about {duration(seconds)} a step, {left} to go[/]")

        yield on_step


def busy(text):
    """A spinner while something without steps goes on."""
    return console.status(f"[dim]{text}[/]")


def table(results, alternating):
    """The comparison: one column per arm, and what the second gains where there are two.

    Args:
        results: arm -> result of its run (finetune.py).
        alternating: arm -> seconds of a step when both arms take turns, or None.
    """
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    made.add_column("")
    for arm in results:
        made.add_column(NAMES[arm], justify="right", style=COLOURS[arm])
    both = len(results) == 2

    def row(name, values, text, better=None):
        cells = [text(value) for value in values]
        if both:
            cells.append(f"{values[0] / values[1]:.1f} x {better}" if better else "")
        made.add_row(name, *cells)

    if both:
        made.add_column("", style="bold")
    runs = list(results.values())
    if alternating:
        row("time per step, taking turns", [alternating[arm] for arm in results], duration, "faster")
    row("time per step, whole run", [run["step_seconds"] for run in runs], duration, "faster")
    row("all training steps", [run["train_seconds"] for run in runs], duration, "faster")
    row("saved for backward, one step", [run["saved_bytes"] for run in runs], size, "less")
    row("peak memory of the process", [run["peak_bytes"] for run in runs], size, "less")
    measure = runs[0]["measure"]
    if runs[0]["score_before"]:
        row(f"{measure} before", [run["score_before"] for run in runs], shown_score)
    row(measure, [run["score"] for run in runs], shown_score)
    return made


def verdict(results, alternating, same):
    """What was gained, in two lines."""
    peft, ours = results["peft"], results["peftkern"]
    faster = alternating["peft"] / alternating["peftkern"]
    less = [peft[name] / ours[name] for name in ("saved_bytes", "peak_bytes")]
    return (
        f"[bold green]{faster:.1f} x faster[/] per step{', the same loss curve' * same}\n"
        f"[bold green]{less[0]:.1f} x less[/] saved for backward, [bold green]{less[1]:.1f} x less[/] peak memory"
    )


def closing(results, alternating, verdicts, passed):
    """The table, the checks and, where all of them passed, the verdict."""
    console.print()
    console.print(table(results, alternating))
    for check in verdicts:
        console.print(f"{MARKS[check.passed]} {check.text}")
    if not passed:
        console.print("\n[bold red]The two runs do not agree.[/]")
    elif alternating:
        # A check that was not judged (half precision) is no ground for a claim.
        same = all(check.passed for check in verdicts)
        console.print()
        console.print(Panel(verdict(results, alternating, same), box=box.ROUNDED, expand=False, padding=(0, 2)))


def files(paths):
    for path, what in paths:
        console.print(f"[dim]{what}:[/] {path}", soft_wrap=True)
