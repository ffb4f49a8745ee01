"""What a person at the terminal sees while a flow runs: one line per stage, a bar while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever listened is gone, as a worker that was killed; what runs goes on without a word."""
        self.quiet = True


console = _Console(stderr=True, highlight=False)
SHOWN = ("loss", "perplexity", "tokens_per_s")
QUIET_INTERVAL_S = 30.0


def _figures(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)


@contextmanager
def stage_progress(title: str) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """Shows how far the stage is: a live bar on a terminal, a line every half minute elsewhere."""
    if console.is_terminal:
        columns = (TextColumn("  {task.description:<36}"), BarColumn(24), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(title, total=None, figures="")

            def show(step: int, total: int, metrics: dict[str, float]) -> None:
                figures = _figures(metrics)
                if figures:
                    progress.update(bar, figures=figures)
                progress.update(bar, completed=step, total=total)

            yield show
        return

    started_at = spoke_at = time.monotonic()

    def say(step: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal spoke_at
        if time.monotonic() - spoke_at >= QUIET_INTERVAL_S:
            spoke_at = time.monotonic()
            console.print(f"  {title}: {step}/{total} after {spoke_at - started_at:.0f} s  {_figures(metrics)}")

    yield say
