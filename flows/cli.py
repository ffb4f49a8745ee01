"""The `slimline` command."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from infra.console import console
from infra.settings import prepare_environment, settings

if TYPE_CHECKING:
    from flows.recipe import Recipe
    from infra.ledger import Entry
    from infra.services import Services

app = typer.Typer(
    help="Make a Transformer language model cheaper to serve, and prove that it still answers well.",
    epilog="Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 done but nothing was accepted, 4 validated but not "
    "decided, 130 interrupted.",
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
    NOT_DECIDED = 4
    INTERRUPTED = 130


def main() -> None:
    """Run the command line; every failure is a message and an exit code, never a traceback."""
    app()


@contextmanager
def _told() -> Iterator[None]:
    """Turns the errors that a user can act on into one message and an exit code."""
    from infra.failures import explain
    from infra.isolation import StageCrashed, StageFailed

    try:
        yield
    except typer.Exit:
        raise
    except (StageFailed, ValueError, FileNotFoundError) as error:
        _fail(str(error), Exit.BAD_INPUT)
    except StageCrashed as error:
        _fail(str(error), Exit.FAILED)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted.[/] Finished stages are kept; the same command goes on from there.")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except Exception as error:
        if said := explain(error, settings().home):
            _fail(said, Exit.FAILED)
        if not isinstance(error, OSError):
            raise
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
        from infra.services import begin_inner_server

        _end_orderly()
        wait_for_server = begin_inner_server()
        from flows.optimize import optimize
        from flows.outcome import show

        wait_for_server()
        outcome = optimize(chosen)
        show(outcome)
    if not outcome.accepted and chosen.validation.limits.metrics():
        raise typer.Exit(Exit.NOTHING_ACCEPTED)


@app.command()
def validate(
    bundle: Annotated[str, typer.Argument(help="An engine bundle: a directory, or models:/NAME@ALIAS.")],
    against: Annotated[str, typer.Option(help="Another bundle, or a model: directory, hub id, models:/NAME@ALIAS.")],
    recipe: Annotated[str | None, typer.Option(help="Whose data, validation and limits to take.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="data.… or validation.… of a recipe, path=value; may be repeated.")
    ] = None,
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="Short for --set validation.limits.…; may be repeated.")
    ] = None,
) -> None:
    """Measure and judge one bundle against another or a model. Exit code 0: ACCEPT, 3: REJECT, 4: neither."""
    with _told():
        _connect()
        from flows.outcome import show
        from flows.validating import command_line, plan_validation
        from flows.validating import validate as run_validation
        from infra.services import start_inner_server

        chosen = [*(options or []), *(f"validation.limits.{limit}" for limit in limits or [])]
        planned, directory = plan_validation(
            bundle, against, recipe=_load(recipe, None) if recipe else None, options=chosen
        )
        _end_orderly()
        start_inner_server()
        outcome = run_validation(planned, bundle, str(directory), command_line(bundle, against, recipe, chosen))
        show(outcome)
    (verdict,) = (row.judgement.verdict for row in outcome.data.rows if row.judgement)
    if verdict != "ACCEPT":
        raise typer.Exit(Exit.NOTHING_ACCEPTED if verdict == "REJECT" else Exit.NOT_DECIDED)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="MLflow run ids, Prefect flow run ids, or names of flow runs.")],
) -> None:
    """Draw earlier runs side by side on one page; nothing is measured anew."""
    with _told():
        _connect()
        from flows.comparing import compare as compare_runs
        from flows.outcome import show_comparison

        data, page = compare_runs(runs)
        show_comparison(data, page)


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
def join(
    recipe: RecipeArgument,
    rank: Annotated[int, typer.Option(min=1, help="Of this machine among the nodes; the run's own is 0.")] = 1,
) -> None:
    """Take part in the trainings of a run of this recipe on another machine that shares its home; ends by Ctrl-C."""
    with _told():
        prepare_environment()
        from infra.torchrun import join as join_once

        how = _load(recipe, None).execution.training
        if rank >= how.nodes:
            raise ValueError(
                f"--rank must be below execution.training.nodes of the recipe, which is {how.nodes}; got {rank}."
            )
        console.print(f"taking part in what {how.rendezvous} trains, as node {rank} of {how.nodes}")
        while True:
            join_once(how, rank)
            time.sleep(1)


@app.command()
def compile(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory, quantized or not; or a model's source.")],
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino or tensorrt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle's directory; new or empty.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the engine, name=value; may be repeated.")
    ] = None,
) -> None:
    """Compile a checkpoint for an engine, and compare its answers with PyTorch's."""
    with _told():
        prepare_environment()
        from flows.bundles import compile_checkpoint, engine_options, said
        from tasks.engines import describe

        chosen = engine_options(engine, options or [])
        summary = compile_checkpoint(checkpoint, chosen, out)
        typer.echo(f"{out}: {describe(chosen)}, {summary.size_bytes / 2**20:.1f} MiB")
        typer.echo(said(summary))
        for note in summary.notes:
            typer.echo(f"note: {note}")


BundleArgument = Annotated[str, typer.Argument(help="An engine bundle: a directory, or models:/NAME@ALIAS.")]
LookupOption = Annotated[
    bool,
    typer.Option("--lookup", help="Propose tokens by prompt lookup: sooner where text repeats; it pauses where not."),
]
DraftOption = Annotated[
    str | None, typer.Option(help="A smaller bundle of the same engine and tokenizer, which proposes tokens.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Of the engine; left out: as tuned, else one per core.")]


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(help="An engine bundle's directory; its manifest is changed.")],
) -> None:
    """Find the settings with which a bundle is fastest on this machine: threads, KV cache, precision, graph level."""
    with _told():
        prepare_environment()
        from flows import bundles

        tuned = bundles.tune(bundles.find_bundle(str(bundle)))
        typer.echo(f"{'setting':<20} {'value':<10} {'TTFT ms':>8} {'TPOT ms':>8}   ({tuned.prompt_tokens} tokens read)")
        for trial in tuned.trials:
            line = f"{trial.setting:<20} {trial.value!s:<10} {trial.ttft_ms:>8.1f} {trial.tpot_ms:>8.2f}"
            typer.echo(f"{line}   {'answers differ: ' + trial.refused if trial.refused else ''}".rstrip())
        typer.echo(f"kept in {bundle / 'manifest.json'}: {tuned.words}")


@app.command()
def generate(
    bundle: BundleArgument,
    prompts: Annotated[list[str], typer.Argument(help="Texts to go on from; - reads one from standard input.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says, or a JSON list of turns.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest that together have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; may be repeated.")] = None,
    lookup: LookupOption = False,
    draft: DraftOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, when it is finished.")] = False,
) -> None:
    """Answer prompts with a bundle: one as it comes, several as JSON lines."""
    with _told():
        _prepare(bundle, draft)
        import sys

        from pydantic import ValidationError

        from flows.bundles import answer, load
        from tasks.engines.text import Sampling

        try:
            sampling = Sampling(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop=tuple(stop or ()),
            )
        except ValidationError as error:
            raise ValueError("; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())) from None
        texts = [sys.stdin.read() if text == "-" else text for text in prompts]
        generator = load(bundle, lookup=lookup, draft=draft, threads=threads)
        answer(generator, texts, sampling, chat=chat, as_json=as_json or len(texts) > 1)


@app.command()
def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option(help="There is no authentication: keep it on this machine, or behind a proxy.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; left out: the bundle's name.")] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests that generate at a time; others wait.")] = 8,
    lookup: LookupOption = False,
    draft: DraftOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a bundle over OpenAI's HTTP interface: /v1/completions, /v1/chat/completions, /v1/models."""
    with _told():
        _prepare(bundle, draft)
        from flows.bundles import load
        from flows.serving import run

        generator = load(bundle, lookup=lookup, draft=draft, threads=threads)
        called = name or bundle.removeprefix("models:/").rstrip("/").rpartition("/")[2]
        run(generator, called, host=host, port=port, max_concurrent=max_concurrent)


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


ModelArgument = Annotated[str, typer.Argument(help="A registered model.")]
WhoOption = Annotated[str | None, typer.Option(help="Your name, for the ledger; left out: MLflow's or the system's.")]
WhyOption = Annotated[str, typer.Option(help="The reason, for the ledger.")]


@app.command()
def promote(
    model: ModelArgument,
    why: WhyOption,
    version: Annotated[str, typer.Argument(help="Its number, or candidate.")] = "candidate",
    who: WhoOption = None,
    approve: Annotated[bool, typer.Option("--approve", help="Approve it yourself, and carry it out at once.")] = False,
    two_person: Annotated[bool, typer.Option("--two-person", help="Somebody else must approve it.")] = False,
    approval_hours: Annotated[float, typer.Option(min=0.01, help="An approval later than that does not count.")] = 24.0,
    revalidate: Annotated[
        Literal["if_hardware_differs", "always", "never"],
        typer.Option(help="Measure and judge it anew on this machine."),
    ] = "if_hardware_differs",
) -> None:
    """Ask to make a version the champion: it is checked, and waits for `slimline approve`. Exit code 4: it waits."""
    with _told():
        _connect()
        from flows.approving import answer, ask, briefing, number_of
        from flows.releasing import carry_out, is_approved, settle

        who, version = _who(who), number_of(model, version, "candidate")
        settled = settle(model)
        if settled and (settled.what, settled.version) == ("promoted", version):
            _released(settled)
            return
        request = ask(
            model,
            version,
            who=who,
            why=why,
            two_person=two_person,
            approval_hours=approval_hours,
            revalidate=revalidate,
        )
        typer.echo(briefing(request))
        if approve:
            answer(request, who=who, why=why, approve=True)
        if is_approved(request):
            _released(carry_out(request))
            return
    typer.echo(f"waits for: slimline approve {model} {request.version} --who NAME --why REASON")
    raise typer.Exit(Exit.NOT_DECIDED)


@app.command()
def approve(
    model: ModelArgument,
    why: WhyOption,
    version: Annotated[str, typer.Argument(help="Its number, or candidate.")] = "candidate",
    who: WhoOption = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="Refuse it instead.")] = False,
) -> None:
    """Approve what was asked for with `slimline promote`, and carry it out: the version becomes the champion."""
    with _told():
        _connect()
        from flows.approving import answer, asked, resume
        from flows.releasing import carry_out

        request = asked(model, version)
        if request.flow_run:
            resume(request, who=_who(who), why=why, approve=not refuse)
            typer.echo(f"told the flow run {request.flow_run}, which goes on")
            return
        found = answer(request, who=_who(who), why=why, approve=not refuse)
        if found.what == "refused":
            typer.echo(f"refused: version {found.version} of {model}")
        else:
            _released(carry_out(request))


@app.command()
def rollback(
    model: ModelArgument,
    why: WhyOption,
    version: Annotated[str, typer.Argument(help="Number of an earlier champion, or previous.")] = "previous",
    who: WhoOption = None,
) -> None:
    """Make an earlier champion the champion again: verified first, tested afterwards. Nothing is deleted."""
    with _told():
        _connect()
        from flows.releasing import roll_back

        _released(roll_back(model, version, who=_who(who), why=why))


@app.command()
def history(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print who did what with which version of a model, when and why, and what became of it."""
    with _told():
        _connect()
        from flows.history import lines, read

        found = read(model)
        for text in [entry.model_dump_json() for entry in found] if as_json else lines(found):
            typer.echo(text)


@app.command()
def verify(
    model: Annotated[str | None, typer.Argument(help="A registered model; left out: all that have a ledger.")] = None,
) -> None:
    """Prove that the ledger is whole and every byte of every champion as it was signed. Exit code 1: it is not."""
    with _told():
        _connect()
        from flows.history import examine

        found = examine(model)
        for finding in found:
            typer.echo(finding.said)
        if not found:
            typer.echo("nothing was released yet, so there is nothing to verify")
    if any(finding.is_problem for finding in found):
        raise typer.Exit(Exit.FAILED)


@app.command()
def retention(
    older_than_days: Annotated[float, typer.Option(min=1, help="What is younger stays.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; left out: only say what would be.")] = False,
) -> None:
    """List runs and artifacts that are old and that no registered version or ledger entry leads to; or delete them."""
    with _told():
        _connect()
        from flows.retention import make_room

        found, said = make_room(older_than_days, dry_run=not delete)
        for each in found:
            typer.echo(f"{each.what:<9} {each.since:%Y-%m-%d}  {each.size_bytes / 2**20:>9.1f} MiB  {each.name}")
        typer.echo(said)


@app.command()
def keys(
    directory: Annotated[
        Path | None, typer.Argument(help="Where to make a new pair; left out: say which keys count here.")
    ] = None,
) -> None:
    """Make a key pair to sign registered versions with; or say which key signs here, and whose signatures count."""
    with _told():
        from infra import signing

        if directory is None:
            typer.echo(f"signs    {signing.key_id(signing.signing_key().public_key())}")
            for key in signing.trusted_keys():
                typer.echo(f"trusted  {signing.key_id(key)}")
            return
        made = signing.make_keys(directory)
        typer.echo(f"{directory / signing.PRIVATE}  for those who sign: SLIMLINE_SIGNING_KEY")
        typer.echo(f"{directory / signing.PUBLIC}  for those who load: SLIMLINE_TRUSTED_KEYS")
        typer.echo(f"key      {made}")


@app.command()
def roles(
    trainers: Annotated[
        list[str] | None, typer.Option("--trainer", help="Account that runs and submits; may be repeated.")
    ] = None,
    releasers: Annotated[
        list[str] | None, typer.Option("--releaser", help="Account that registers and releases; may be repeated.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Registered model that no trainer may make; may be repeated.")
    ] = None,
) -> None:
    """Say at a shared MLflow server who may release: trainers may not. With the admin's account; may be repeated."""
    with _told():
        _connect()
        from infra.roles import give

        if not trainers and not releasers:
            raise ValueError("Roles are given to accounts; name them with --trainer and --releaser.")
        for line in give({"trainer": trainers or [], "releaser": releasers or []}, models or []):
            typer.echo(line)


@app.command()
def admit(
    model: Annotated[str | None, typer.Argument(help="Only for this registered model; left out: all.")] = None,
) -> None:
    """Register what trainers submitted, after verifying its signature and every byte. With a releaser's account."""
    with _told():
        _connect()
        from infra.registry import admit as admit_all

        made = admit_all(model)
        for version in made:
            typer.echo(f"registered  {version.model} version {version.version}: {version.uri}")
        if not made:
            typer.echo("nothing waits to be registered")


@app.command()
def bridge(
    host: Annotated[str, typer.Option(help="MLflow's server has to reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8765,
) -> None:
    """Tell Prefect what happens in MLflow's registry: takes MLflow's signed webhooks (SLIMLINE_WEBHOOK_SECRET)."""
    with _told():
        from infra import services

        prepare_environment(**services.for_clients(settings().home))
        from flows.deployments import server
        from infra import bridge as events

        secret, where = events.secret(), server()
        typer.echo(f"http://{host}:{port}/ takes MLflow's webhooks and tells {where}; stop with Ctrl-C")
        events.run(host, port, secret)


@app.command()
def webhook(
    url: Annotated[str, typer.Argument(help="Of the bridge, as MLflow's server reaches it.")],
) -> None:
    """Have MLflow's server tell the bridge what happens in its registry. With the admin's account; may be repeated."""
    with _told():
        _connect()
        from infra.bridge import webhook_of
        from infra.registry import tell_of_changes

        tell_of_changes(webhook_of(url))
        typer.echo(f"MLflow tells {url} of new versions and aliases")


@app.command()
def up(
    database: Annotated[
        Literal["sqlite", "postgres"],
        typer.Option(help="What MLflow and Prefect keep their records in; postgres bears many writers."),
    ] = "sqlite",
) -> None:
    """Start the services on this machine: S3, MLflow, Prefect and a worker that runs what is started from its page."""
    with _told():
        prepare_environment()
        from infra import services

        running = services.running(settings().home)
        started = services.up(settings().home, database=database)
        typer.echo("already running" if running else "started")
        _show(started)
        typer.echo("stop with: make down (slimline down)")


@app.command()
def down() -> None:
    """Stop what `slimline up` started."""
    with _told():
        from infra import services

        typer.echo("stopped" if services.down(settings().home) else "nothing was running")


@app.command()
def status() -> None:
    """Say whether the services run, and where."""
    with _told():
        from infra import services

        found = services.running(settings().home)
        if not found:
            typer.echo("not running; start with: make up (slimline up)")
            raise typer.Exit(Exit.FAILED)
        _show(found)


@app.command()
def deploy(
    file: Annotated[Path | None, typer.Option(help="Another prefect.yaml than Slimline's.")] = None,
    pools: Annotated[
        list[str] | None, typer.Option("--pool", help="Only what concerns this work pool; may be repeated.")
    ] = None,
) -> None:
    """Tell the Prefect server what prefect.yaml says: work pools, limits, deployments, automations. May be repeated."""
    with _told():
        from infra import services

        prepare_environment(**services.for_clients(settings().home))
        from flows.deployments import deploy as deploy_all
        from flows.deployments import server

        where = server()
        plan = deploy_all(file, pools or [])
        for name, deployments in plan.deployments.items():
            typer.echo(f"{name:<12} {', '.join(deployments)}")
        for name in sorted(plan.work_pools.keys() - plan.deployments.keys()):
            typer.echo(f"{name:<12} no deployments")
        for name, limit in plan.concurrency_limits.items():
            typer.echo(f"limit {name}: {limit}")
        typer.echo(f"told {where}")


def _show(found: "Services") -> None:
    typer.echo(f"  Prefect  {found.prefect_url}")
    typer.echo(f"  MLflow   {found.mlflow_page}")
    typer.echo(f"  S3       {found.s3_url}  (keys: {settings().home / 'credentials.json'})")
    typer.echo(f"  records  {found.database}")


@app.command()
def doctor(
    checks: Annotated[list[str] | None, typer.Argument(help="Only these; left out: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds, for each check.")] = 60.0,
) -> None:
    """Examine this deployment by real calls, and say what to do. Exit code 0: no problem was found, 1: one was."""
    with _told():
        from infra.doctor.examination import as_json as written
        from infra.doctor.examination import examine, show

        with console.status("looking at everything that this deployment stands on"):
            findings = examine(checks or [], timeout)
        if as_json:
            typer.echo(written(findings))
        else:
            show(findings)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(Exit.FAILED)


def _who(name: str | None) -> str:
    from infra.settings import outer

    found = name or outer("MLFLOW_TRACKING_USERNAME", "LOGNAME", "USER")
    if not found:
        raise ValueError("The ledger keeps who does it; neither MLflow nor the system knows. Say it: --who NAME")
    return found


def _released(entry: "Entry") -> None:
    was = f"version {entry.replaces}" if entry.replaces else "nothing"
    typer.echo(f"{entry.what}: version {entry.version} of {entry.model} is the champion; it was {was}")


def _prepare(*models: str | None) -> None:
    """Ready to load bundles; the servers are asked only where one is a registered version."""
    if any(model and model.startswith("models:/") for model in models):
        _connect()
    else:
        prepare_environment()


def _end_orderly() -> None:
    """Asked to end from elsewhere: as orderly as by Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)


def _connect() -> None:
    """Point Prefect and MLflow at the servers of `slimline up` when they run, else at files under the home."""
    from infra import services
    from infra.artifacts import remove_abandoned
    from infra.failures import require_room

    home = settings().home
    require_room(home)
    services.end_orphans(home)
    remove_abandoned()
    prepare_environment(**services.for_clients(home), **services.run_mark(home))


def _load(name_or_path: str, source: str | None) -> "Recipe":
    from flows.recipe import find, load

    recipe = load(find(name_or_path))
    return recipe.model_copy(update={"source": source}) if source else recipe


if __name__ == "__main__":
    main()
