"""A scan of many tiny pictures by several workers, one of which is killed on the way.

    python -m benchmarks.scanning RUN --pictures 100000 --workers 2
    python -m benchmarks.scanning RUN --pictures 4000 --speed

The first judges all of them while a worker is killed, and says whether each has one verdict. The
second judges the same pictures with one worker and with several, in turns, and prints the ratio of
their rates, start-up left out.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image
from pyarrow import parquet

A_SHARD = 500
SIDE = 8  # pixels
WAIT = 3600.0


def write_shards(folder: Path, pictures: int, a_shard: int = A_SHARD, seed: int = 0) -> set[str]:
    """WebDataset shards of random pictures; the names that their verdicts will have."""
    rng = np.random.default_rng(seed)
    names = set()
    for first in range(0, pictures, a_shard):
        path = folder / f"{first // a_shard:05}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + a_shard, pictures)):
                content = io.BytesIO()
                values = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(values).save(content, "PNG")
                member = tarfile.TarInfo(f"{number:07}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
                names.add(f"{path}: {member.name}")
    return names


def start_scan(
    run: Path, shards: Path, output: Path, workers: int | None, log: Path, *options: str
) -> subprocess.Popen[bytes]:
    """`vqguard scan` as a process of its own."""
    command = [sys.executable, "-m", "vqguard.cli", "scan", str(shards), "--run", str(run)]
    command += ["--output", str(output), *options]
    command += [] if workers is None else ["--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def parts_of(output: Path) -> list[Path]:
    """The verdicts that are written."""
    return list(output.glob("*.parquet"))


def workers_of(scan: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that judge for a scan, by what Ray calls them."""
    found = []
    for process in psutil.Process(scan.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::") and "_UnitRows" in name:
            found.append(process)
    return found


def kill_a_worker(scan: subprocess.Popen[bytes], output: Path, after: int = 1) -> int:
    """Kill a worker once so many parts are there; returns its process number."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until and scan.poll() is None:
        if len(parts_of(output)) >= after and (judging := workers_of(scan)):
            number = int(judging[0].pid)
            os.kill(number, signal.SIGKILL)
            return number
        time.sleep(0.02)
    raise RuntimeError(f"the scan ended with {scan.poll()} before a worker could be killed")


def verdicts_of(output: Path) -> Counter[str]:
    """How many verdicts each picture has."""
    return Counter(
        name for part in parts_of(output) for name in parquet.read_table(part)["image"].to_pylist()
    )


def rate(run: Path, shards: Path, output: Path, workers: int) -> float:
    """Shards a second, from the first that is written to the last."""
    scan = start_scan(run, shards, output, workers, output.with_suffix(".log"))
    if scan.wait(WAIT) not in (0, 1):
        raise RuntimeError(output.with_suffix(".log").read_text()[-4000:])
    times = sorted(part.stat().st_mtime for part in parts_of(output))
    return (len(times) - workers) / (times[-1] - times[workers - 1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--pictures", type=int, default=100_000)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--speed", action="store_true")
    arguments.add_argument("--repeats", type=int, default=3)
    asked = arguments.parse_args()
    with TemporaryDirectory() as name:
        place = Path(name)
        shards = place / "shards"
        shards.mkdir()
        names = write_shards(shards, asked.pictures, A_SHARD if not asked.speed else 100)
        print(f"load of the machine: {os.getloadavg()[0]:.1f}, processors: {os.cpu_count()}")
        if asked.speed:
            ratios = []
            for turn in range(asked.repeats):
                rates = [
                    rate(asked.run, shards, place / f"{turn}-{count}", count)
                    for count in (1, asked.workers)
                ]
                ratios.append(rates[1] / rates[0])
                print(f"{rates[0] * 100:.0f} and {rates[1] * 100:.0f} pictures/s: {ratios[-1]:.2f}")
            print(
                f"ratio of {asked.workers} workers to one, median: {statistics.median(ratios):.2f}"
            )
            return
        begun = time.monotonic()
        scan = start_scan(asked.run, shards, place / "out", asked.workers, place / "log")
        try:
            killed = kill_a_worker(scan, place / "out", after=len(names) // A_SHARD // 3)
        except RuntimeError as error:
            raise SystemExit(f"{error}\n{(place / 'log').read_text()}") from error
        code = scan.wait(WAIT)
        found = verdicts_of(place / "out")
        print((place / "log").read_text().strip())
        print(
            f"worker {killed} was killed; exit code {code}; {len(names)} pictures, "
            f"{sum(found.values())} verdicts, {len(names - found.keys())} without, "
            f"{sum(count > 1 for count in found.values())} with several; "
            f"{time.monotonic() - begun:.0f} s; load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
