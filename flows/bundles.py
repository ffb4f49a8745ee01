"""Engine bundles from the command line: compile a checkpoint, find a bundle, answer prompts."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from infra.console import console, stage_progress
from infra.isolation import run_isolated
from infra.settings import settings

if TYPE_CHECKING:
    from tasks.engines import Engine
    from tasks.engines.compiling import EngineSummary
    from tasks.engines.text import Answer, Sampling, TextGenerator, Work
    from tasks.engines.tuning import Tuned


def engine_options(name: str, options: Sequence[str]) -> "Engine":
    """The options of an engine, from its name and "option=value" texts.

    Raises:
        ValueError: there is no such engine or option, or a value is not allowed.
    """
    from tasks.engines import Engine

    chosen: dict[str, Any] = {"engine": name, "precision": "float32"}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"An engine's option is given as --set name=value; got {option!r}.")
        chosen[key] = value
    adapter: TypeAdapter[Engine] = TypeAdapter(Engine)
    try:
        return adapter.validate_python(chosen)
    except ValidationError as error:
        raise ValueError(f"The engine's options cannot be used: {_problems(error)}.") from None


def compile_checkpoint(source: str, engine: "Engine", out: Path) -> "EngineSummary":
    """Compiles a checkpoint directory, or a model that is imported first, into the directory `out`.

    Args:
        source: a directory with config.json and safetensors, quantized or not; or a source as recipes name it.
        out: must not exist, or be empty; it appears when it is whole.

    Raises:
        ValueError: the source is none, `out` holds something, or the engine cannot compile or differs from PyTorch.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out must be a new or empty directory; {out} holds files. Name another.")
    if problem := engine.missing():
        raise ValueError(problem)
    from tasks.engines.compiling import EngineSummary

    out.parent.mkdir(parents=True, exist_ok=True)
    log = settings().home / "logs" / f"compile-{out.name}-{int(time.time())}.log"
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        checkpoint, partial = Path(source), Path(folder) / "bundle"
        if not _is_checkpoint(checkpoint):
            checkpoint = Path(folder) / "checkpoint"
            checkpoint.mkdir()
            with stage_progress("import"):
                given = {"source": source, "out": checkpoint}
                run_isolated("tasks.calibration.checkpoints:import_checkpoint", given, result=Any, log_path=log)
        partial.mkdir()
        with stage_progress(f"compile for {engine.engine}") as show:
            given = {"checkpoint": checkpoint.resolve(), "data": None, "engine": engine, "out": partial.resolve()}
            summary, _ = run_isolated(
                "tasks.engines.compiling:compile_engine",
                {**given, "threads": settings().num_threads},
                result=EngineSummary,
                log_path=log,
                on_progress=show,
            )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    return summary


def said(summary: "EngineSummary") -> str:
    """How close a bundle is to PyTorch, in words."""
    from tasks.engines.parity import Parity

    parity = summary.parity
    if parity is None:
        return f"built, not run here: {summary.why_not_run}"
    if not isinstance(parity, Parity):
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in parity.model_dump().items())
        return f"as PyTorch answers: {figures}"
    greedy = parity.greedy
    text = (
        f"as PyTorch answers on {parity.num_positions} positions: largest difference of a logit "
        f"{max(parity.max_abs_error, parity.decode_max_abs_error):.2g}, KL {parity.kl_nats:.2g} nats, "
        f"same likeliest token {parity.top1_agreement:.1%}\n"
        f"greedy text: {greedy.num_same} of {greedy.num_sequences} the same for {greedy.num_new_tokens} tokens"
    )
    if parted := greedy.first_divergence:
        text += f"; the first parts at token {parted.position + 1}, {parted.logit_gap:.2g} logits apart"
    return text


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def tune(bundle: Path) -> "Tuned":
    """Searches a bundle's fastest settings on this machine, and keeps them in its manifest.

    Raises:
        ValueError: it is a registered version's, which is signed as it is.
    """
    if bundle.resolve().is_relative_to(settings().home / "versions"):
        raise ValueError(
            f"A bundle that is tuned is changed; {bundle} is of a registered version, which is signed as it is. Tune a "
            "copy of it, or let the recipe tune the candidate (`tune`)."
        )
    from tasks.engines.tuning import Tuned

    with stage_progress("tune") as show:
        tuned, _ = run_isolated(
            "tasks.engines.compiling:tune_bundle",
            {"bundle": bundle.resolve(), "max_threads": settings().num_threads},
            result=Tuned,
            log_path=settings().home / "logs" / f"tune-{bundle.name}-{int(time.time())}.log",
            on_progress=show,
        )
    return tuned


def find_bundle(name: str) -> Path:
    """The directory of a bundle: as named, or of a registered version, which is fetched once and verified.

    Raises:
        ValueError: there is no such bundle.
    """
    if not name.startswith("models:/"):
        if not Path(name).is_dir():
            raise ValueError(
                f"A bundle is a directory that `slimline compile` or a run wrote, or models:/NAME@ALIAS; got {name!r}."
            )
        return Path(name)
    from infra.registry import bundle_at

    return bundle_at(name)


def load(bundle: str, *, lookup: bool, draft: str | None, threads: int | None) -> "TextGenerator":
    """The bundle that `bundle` names, ready to answer."""
    from tasks.engines.compiling import load_generator
    from tasks.engines.proposals import Lookup

    return load_generator(
        find_bundle(bundle),
        threads=threads or settings().threads,
        lookup=Lookup() if lookup else None,
        draft=find_bundle(draft) if draft else None,
    )


def turns(prompt: str) -> list[dict[str, str]]:
    """The messages of a chat: JSON as given, or a text as the user's."""
    if prompt.lstrip().startswith("["):
        try:
            found = json.loads(prompt)
        except ValueError:
            found = None
        if isinstance(found, list) and all(
            isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in found
        ):
            return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in found]
    return [{"role": "user", "content": prompt}]


def answer(
    generator: "TextGenerator", texts: Sequence[str], sampling: "Sampling", *, chat: bool, as_json: bool
) -> None:
    """Writes answers to standard output, and to standard error what they took."""
    from rich.markup import escape

    prompts = [generator.encode_chat(turns(text)) if chat else generator.encode(text) for text in texts]
    started_at = time.perf_counter()

    def show(index: int, text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    answers, work = generator.answer(prompts, sampling, show)
    elapsed_s = time.perf_counter() - started_at
    for text, found in zip(texts, answers, strict=True):
        if as_json:
            line = json.dumps({"prompt": text, **found.model_dump(exclude={"tokens"})}, ensure_ascii=False)
            sys.stdout.write(line + "\n")
        else:
            sys.stdout.write("\n")
    sys.stdout.flush()
    console.print(f"[dim]{escape(_took(answers, work, elapsed_s))}[/]", soft_wrap=True)


def _took(answers: "Sequence[Answer]", work: "Work", elapsed_s: float) -> str:
    asked, written = sum(a.num_prompt_tokens for a in answers), sum(len(a.tokens) for a in answers)
    said = f"{asked} tokens read, {written} written in {elapsed_s:.2f} s ({written / elapsed_s:.1f} per second)"
    if work.num_accepted is not None:
        said += f"; {written / max(work.num_steps + len(answers), 1):.2f} tokens per pass of the model"
    if work.num_proposed:
        said += f", {work.num_accepted} of {work.num_proposed} proposed tokens accepted"
    return said


def _problems(error: ValidationError) -> str:
    found = []
    for each in error.errors():
        name = ".".join(str(part) for part in each["loc"][1:])
        said = {
            "extra_forbidden": "there is no such option",
            "union_tag_invalid": f"the engine must be one of {each.get('ctx', {}).get('expected_tags')}; got "
            f"{each.get('ctx', {}).get('tag')!r}",
        }.get(each["type"], each["msg"])
        found.append(f"{name}: {said}" if name else said)
    return "; ".join(found)
