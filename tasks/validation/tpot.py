"""Stage: the time of a token on the target engine with each choice of mixed precision, measured.

For each choice, a model is really quantized (rounded to nearest: an engine's time does not depend on values), compiled,
and timed beside all the others in interleaved blocks. Blocks are timed on every choice with the tables on their first,
tables on every further choice with the blocks on their first.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.calibration.architectures import architecture
from tasks.calibration.progress import Report, silent
from tasks.engines import Engine, label
from tasks.engines.compiling import compile_engine, read_manifest
from tasks.quantization import Grid, RoundToNearest
from tasks.quantization.activations import Format
from tasks.quantization.apply import quantize_checkpoint
from tasks.quantization.token_times import TIMES, Pair, TimedChoice, TokenTimes, pairs_to_time
from tasks.validation.latency import ORIGINAL, Speed, SpeedSummary, Subject, measure_speed


def measure_tpot(
    *,
    checkpoint: Path,
    data: Path,
    engine: Engine,
    choices: tuple[Grid, ...],
    tables: tuple[Grid | None, ...],
    ignore: tuple[str, ...],
    kv_cache: Format | None,
    options: Speed,
    threads: int,
    out: Path,
    report: Report = silent,
) -> TokenTimes:
    """Time every choice, and write the figures to `out`/tpot.json, single requests to `out`/repetitions.parquet.

    Args:
        checkpoint: plain checkpoint directory, float.
        data: prepared data; prompts are evaluation text, and a KV cache is calibrated on calibration text.
        engine: options of the one engine that this is about.
        choices: grids for the linear layers of blocks.
        tables: grids for the embedding and the LM head.
        ignore: layers that are left alone.
        kv_cache: as the model will keep it.
        options: how speed is measured.
        threads: of the engine.
        out: receives the figures; holds all engines until they are measured.
        report: told after every engine that is built, and after every block of time.

    Raises:
        ValueError: the engine cannot run here or hold a choice, or a group size does not divide a layer.
    """
    if problem := engine.missing() or engine.cannot_run():
        raise ValueError(f"`tpot_ms` is measured on the engine: {problem}")
    pairs = pairs_to_time(choices, tables)
    kinds = list(dict.fromkeys(pairs.values()))
    bundles: dict[Pair, Path] = {}
    with TemporaryDirectory(dir=out) as temporary:
        for pair in kinds:
            weights, embeddings = pair
            method = RoundToNearest(weights=weights, embeddings=embeddings, ignore=ignore, kv_cache=kv_cache)
            bundles[pair] = Path(temporary) / f"engine-{len(bundles)}"
            bundles[pair].mkdir()
            with TemporaryDirectory(dir=temporary) as quantized:
                quantize_checkpoint(checkpoint=checkpoint, data=data, method=method, out=Path(quantized))
                compile_engine(checkpoint=Path(quantized), data=data, engine=engine, threads=threads, out=bundles[pair])
            report(len(bundles), len(kinds) + options.num_blocks, {})
        manifest = read_manifest(bundles[kinds[0]])
        speed = measure_speed(
            subjects=[Subject(name=bundle.name, bundle=bundle) for bundle in bundles.values()],
            original=checkpoint,
            data=data,
            options=options,
            threads=threads,
            out=out,
            report=lambda step, total, figures: report(len(kinds) + step, len(kinds) + total, figures),
        )
    for reason in speed.failed.values():
        raise ValueError(f"A choice's time per token could not be measured. {reason}")
    measured = {pair: _tpot_ms(speed, bundles[kind].name) for pair, kind in pairs.items()}
    times = TokenTimes(
        engine=label(engine),
        blocks=tuple(TimedChoice(grid=choice, tpot_ms=measured[choice, tables[0]]) for choice in choices),
        tables=tuple(TimedChoice(grid=table, tpot_ms=measured[choices[0], table]) for table in tables),
        embedding=architecture(json.loads((checkpoint / "config.json").read_text())["model_type"]).embedding,
        prompt_tokens=speed.prompt_tokens,
        new_tokens=speed.new_tokens,
        num_blocks=speed.num_blocks,
        threads=threads,
        versions=manifest.versions,
        processor=manifest.processor,
        notes=[speed.noise] if speed.noisy else [],
    )
    (out / TIMES).write_text(times.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return times


def _tpot_ms(speed: SpeedSummary, name: str) -> float:
    """The median, by way of the ratio to the original: subjects of other groups ran while the machine was another."""
    original = speed.subjects[ORIGINAL].tpot_ms
    assert original is not None  # decoders write
    return speed.subjects[name].tpot_ratios_to_original["p50"].value * original.p50.value
