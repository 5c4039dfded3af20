"""Load on `vqguard serve`: clients of every kind at a time, answers compared, memory read.

    python -m benchmarks.serving RUN --pictures DIR --seconds 300 --clients 50
    python -m benchmarks.serving RUN --pictures DIR --batching
    python -m benchmarks.serving RUN --pictures DIR --sizing --seconds 100
    python -m benchmarks.serving RUN --memory

The first prints requests by kind and status, wrong verdicts, the seconds of answered requests and
the server's memory minute by minute. The second serves clean pictures to 16 clients with batches
of 16 and of 1, alternated, and prints the ratio. The third is a table of what 1, 4, 16 and 50
clients get who send clean and flagged pictures without a pause. The last opens the run whole and as
a gateway does, in processes of their own, alternated, and prints their memory.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

WAIT = 600.0
KINDS = ("clean", "flagged", "broken", "huge", "slow", "aborted")
_MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


@dataclass
class Seen:
    """What the clients saw, and the server's memory."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)


@contextmanager
def server(run: Path, **limits: int) -> Iterator[str]:
    """The address of a server of `run`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "limits.yaml"
        file.write_text(json.dumps(limits))
        command = [sys.executable, "-m", "vqguard.cli", "serve", str(run), "--port", "0"]
        with subprocess.Popen(
            [*command, "--name", "served", "--limits", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield line.removeprefix("listening on ").strip()
            process.terminate()
            print("exit code", process.wait(WAIT))


class Load:
    """Clients of one server."""

    def __init__(self, address: str, pictures: list[Path]) -> None:
        self.address = address
        self.seen = Seen()
        self.urls = [_uri(path.read_bytes()) for path in pictures]
        self.expected = {url: self._answer(url) for url in self.urls}
        split: dict[bool, list[str]] = {False: [], True: []}
        for url, answer in self.expected.items():
            split[answer[1] == "content_filter"].append(url)
        self.split = split
        noise = os.urandom(1000)
        self.kinds: dict[str, Callable[[httpx2.Client, random.Random], int]] = {
            "clean": lambda client, chosen: self._ask(client, chosen.choice(split[False])),
            "flagged": lambda client, chosen: self._ask(client, chosen.choice(split[True])),
            "broken": lambda client, _: self._send(client, _uri(noise)),
            "huge": lambda client, _: self._send(client, _uri(_HUGE)),
            "slow": self._slowly,
            "aborted": self._leave,
        }

    def run(self, clients: int, seconds: float, kinds: tuple[str, ...] = KINDS) -> int:
        """How many requests were served."""
        until = time.monotonic() + seconds

        def work(number: int) -> None:
            chosen = random.Random(number)
            with httpx2.Client(timeout=WAIT) as client:
                while time.monotonic() < until:
                    kind = chosen.choice(kinds)
                    status = self.kinds[kind](client, chosen)
                    self.seen.statuses[kind, status] += 1
                    if status == 429:
                        time.sleep(chosen.random())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            page = httpx2.get(f"{self.address}/metrics", timeout=WAIT).text
            memory = _MEMORY.search(page)
            if memory is not None:
                self.seen.memory.append((time.monotonic() - start, float(memory[1])))
            time.sleep(1)
        return sum(self.seen.statuses.values())

    def _body(self, url: str, **fields: Any) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "what is in the image ?"},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": "served", "messages": messages, "max_tokens": 16, **fields}

    def _post(self, client: httpx2.Client | Any, body: Any) -> httpx2.Response:
        answer: httpx2.Response = client.post(f"{self.address}/v1/chat/completions", json=body)
        return answer

    def _answer(self, url: str) -> tuple[str, str]:
        with httpx2.Client(timeout=WAIT) as client:
            choice = self._post(client, self._body(url)).json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    def _ask(self, client: httpx2.Client, url: str) -> int:
        start = time.monotonic()
        answer = self._post(client, self._body(url))
        if answer.status_code == 200:
            self.seen.seconds.append(time.monotonic() - start)
            choice = answer.json()["choices"][0]
            told = choice["message"]["content"], choice["finish_reason"]
            if told != self.expected[url]:
                self.seen.wrong.append(f"{told} instead of {self.expected[url]}")
        return answer.status_code

    def _send(self, client: httpx2.Client, url: str) -> int:
        return self._post(client, self._body(url)).status_code

    def _slowly(self, client: httpx2.Client, chosen: random.Random) -> int:
        content = json.dumps(self._body(chosen.choice(self.urls))).encode()
        size = max(1, len(content) // 5)

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(content), size):
                time.sleep(0.2)
                yield content[start : start + size]

        headers = {"content-type": "application/json"}
        url = f"{self.address}/v1/chat/completions"
        return client.post(url, content=pieces(), headers=headers).status_code

    def _leave(self, client: httpx2.Client, chosen: random.Random) -> int:
        body = self._body(chosen.choice(self.split[False]), max_tokens=64, stream=True)
        with client.stream("POST", f"{self.address}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines(), None)
            return answer.status_code


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _huge() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(content, "PNG")
    return content.getvalue()


_HUGE = _huge()


def report(seen: Seen) -> None:
    """Print what was seen."""
    for (kind, status), count in sorted(seen.statuses.items()):
        print(f"{kind:8} {status} {count}")
    print("wrong", len(seen.wrong), *seen.wrong[:3])
    ordered = sorted(seen.seconds)
    print(
        f"median {statistics.median(ordered):.3f} s, p99 {ordered[int(0.99 * len(ordered))]:.3f} s"
    )
    for minute in range(int(seen.memory[-1][0] // 60) + 1):
        peak = max((m for at, m in seen.memory if at // 60 == minute), default=0.0)
        print(f"minute {minute + 1}: peak {peak / 2**20:.0f} MiB")


def sizing(run: Path, pictures: list[Path], seconds: float) -> None:
    """Print a row for each number of clients, which share `seconds`."""
    counts = (1, 4, 16, 50)
    print("| clients | requests a second | median, s | 99 %, s | memory, MiB |")
    print("| --- | --- | --- | --- | --- |")
    with server(run) as address:
        load = Load(address, pictures)
        for clients in counts:
            load.seen = Seen()
            start = time.monotonic()
            count = load.run(clients, seconds / len(counts), ("clean", "flagged"))
            rate = count / (time.monotonic() - start)
            ordered = sorted(load.seen.seconds)
            memory = max(value for _, value in load.seen.memory) / 2**20
            p99 = ordered[int(0.99 * len(ordered))]
            print(
                f"| {clients} | {rate:.1f} | {statistics.median(ordered):.3f} | {p99:.3f} "
                f"| {memory:.0f} |"
            )
            assert not load.seen.wrong, load.seen.wrong[:3]


_OPENED = """
import re, sys
from pathlib import Path
from vqguard.recipes import run
loaded = getattr(run, sys.argv[1])(Path(sys.argv[2]))
status = Path("/proc/self/status").read_text()
used = [1024 * int(re.search(rf"{n}:\\s*(\\d+)", status)[1]) for n in ("VmRSS", "VmHWM")]
print(sum(p.numel() * p.element_size() for p in loaded.model.parameters()), *used)
"""


def opened_memory(run: Path) -> None:
    """Print parameters, memory and peak memory, in MiB, of a run that is open; medians of three."""
    seen: dict[str, list[list[int]]] = {"open_run": [], "open_judge": []}
    for _ in range(3):
        for name, rows in seen.items():
            command = [sys.executable, "-c", _OPENED, name, str(run)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append([int(number) for number in done.stdout.split()])
    for name, rows in seen.items():
        held, memory, peak = (
            statistics.median(column) / 2**20 for column in zip(*rows, strict=True)
        )
        print(f"{name}: parameters {held:.0f}, memory {memory:.0f}, peak {peak:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--batching", action="store_true")
    parser.add_argument("--sizing", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        opened_memory(options.run)
        return
    if options.pictures is None:
        parser.error("--pictures is needed: a folder of PNG files")
    pictures = sorted(options.pictures.glob("*.png"))[:24]
    if options.sizing:
        sizing(options.run, pictures, options.seconds)
        return
    if not options.batching:
        with server(options.run) as address:
            load = Load(address, pictures)
            load.run(options.clients, options.seconds)
            report(load.seen)
        return
    rates: dict[int, list[float]] = {16: [], 1: []}
    with server(options.run, batch=16) as together, server(options.run, batch=1) as alone:
        loads = {16: Load(together, pictures), 1: Load(alone, pictures)}
        for _ in range(5):
            for batch, load in loads.items():
                before = sum(load.seen.statuses.values())
                count = load.run(16, options.seconds / 10, ("clean",)) - before
                rates[batch].append(count / (options.seconds / 10))
    medians = {batch: statistics.median(rate) for batch, rate in rates.items()}
    print(f"{medians[16]:.1f} / {medians[1]:.1f} requests a second: {medians[16] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
