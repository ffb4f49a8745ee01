"""The `slimline` command."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from infra.console import console
from infra.settings import prepare_environment, settings

if TYPE_CHECKING:
    from flows.recipe import Recipe

app = typer.Typer(
    help="Make a Transformer language model cheaper to serve, and prove that it still answers well.",
    epilog="Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 done but nothing was accepted, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]


class Exit(IntEnum):
    """What the exit code of a command means."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    NOTHING_ACCEPTED = 3
    INTERRUPTED = 130


def main() -> None:
    """Run the command line; every failure is a message and an exit code, never a traceback."""
    app()


@contextmanager
def _told() -> Iterator[None]:
    """Turns the errors that a user can act on into one message and an exit code."""
    from infra.isolation import StageCrashed, StageFailed

    try:
        yield
    except (StageFailed, ValueError, FileNotFoundError) as error:
        _fail(str(error), Exit.BAD_INPUT)
    except StageCrashed as error:
        _fail(str(error), Exit.FAILED)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted.[/] Finished stages are kept; the same command goes on from there.")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), Exit.FAILED)


def _fail(message: str, code: Exit) -> None:
    console.print(f"[red]error[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


@app.command()
def run(
    recipe: RecipeArgument,
    source: Annotated[str | None, typer.Option(help="Another model than the recipe's.")] = None,
) -> None:
    """Optimize a model by a recipe, measure it, and register the best accepted candidate."""
    with _told():
        _connect()
        chosen = _load(recipe, source)
        from flows.optimize import optimize
        from flows.outcome import show
        from infra.services import start_inner_server

        for number in (signal.SIGTERM, signal.SIGHUP):  # asked to end from elsewhere: as orderly as by Ctrl-C
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, signal.default_int_handler)
        start_inner_server()
        outcome = optimize(chosen)
        show(outcome)
    if not outcome.accepted and chosen.validation.limits.metrics():
        raise typer.Exit(Exit.NOTHING_ACCEPTED)


@app.command()
def check(
    recipe: RecipeArgument,
    source: Annotated[str | None, typer.Option(help="Another model than the recipe's.")] = None,
) -> None:
    """Validate a recipe and print the plan: what would run, what is cached, what it needs, what cannot be done here."""
    with _told():
        _connect()
        chosen = _load(recipe, source)
        from flows.check import plan, show

        found = plan(chosen)
        show(found)
    if found.obstacles:
        raise typer.Exit(Exit.BAD_INPUT)


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file, instead of standard output.")] = None,
) -> None:
    """Print the JSON schema of recipes, for editors and other tools."""
    import json

    from flows.recipe import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=1) + "\n"
    if out:
        with _told():
            out.write_text(text)
    else:
        typer.echo(text, nl=False)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from flows.recipe import directory, names

    for name in names():
        first = (directory() / f"{name}.yaml").read_text().splitlines()
        title = next((line.lstrip("# ") for line in first if line.startswith("# ") and "yaml-language" not in line), "")
        typer.echo(f"{name:<28} {title}")


@app.command()
def lineage(
    model: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, an MLflow model id or a SHA-256.")
    ],
) -> None:
    """Print what a model was made from, stage by stage, back to the original."""
    with _told():
        _connect()
        from infra.tracking import lineage as walk

        for ancestor in walk(model):
            typer.echo(
                f"{ancestor.name:<36} {ancestor.kind:<11} sha256 {(ancestor.sha256 or '')[:12]}  run {ancestor.run_id}"
            )


@app.command()
def up() -> None:
    """Start the Prefect and MLflow pages on this machine, and accept runs started from the Prefect page."""
    with _told():
        prepare_environment()
        from infra import services

        running = services.running(settings().home)
        started = running or services.up(settings().home)
        typer.echo("already running" if running else "started")
        typer.echo(f"  Prefect  {started.prefect_url}")
        typer.echo(f"  MLflow   {started.mlflow_page}")
        typer.echo("stop with: make down (slimline down)")


@app.command()
def down() -> None:
    """Stop what `slimline up` started."""
    with _told():
        from infra import services

        typer.echo("stopped" if services.down(settings().home) else "nothing was running")


@app.command()
def status() -> None:
    """Say whether the pages run, and where."""
    with _told():
        from infra import services

        found = services.running(settings().home)
        if not found:
            typer.echo("not running; start with: make up (slimline up)")
            raise typer.Exit(Exit.FAILED)
        typer.echo(f"Prefect  {found.prefect_url}\nMLflow   {found.mlflow_page}")


def _connect() -> None:
    """Point Prefect and MLflow at the servers of `slimline up` when they run, else at files under the home."""
    from infra import services

    home = settings().home
    services.end_orphans(home)
    running = services.running(home)
    servers = {"PREFECT_API_URL": running.prefect_api_url} if running else {}
    prepare_environment(**servers, **services.run_mark(home))


def _load(name_or_path: str, source: str | None) -> "Recipe":
    from flows.recipe import find, load

    recipe = load(find(name_or_path))
    return recipe.model_copy(update={"source": source}) if source else recipe


if __name__ == "__main__":
    main()
