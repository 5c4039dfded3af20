"""Scans by several processes: Ray hands units out, and a worker that dies costs nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from vqguard.errors import VQGuardError
from vqguard.recipes.run import save_run_model

from .conftest import MakeModel, calibrate_on, noisy_pictures

pytest.importorskip("ray", reason="needs the extra ray")
parquet = pytest.importorskip("pyarrow.parquet")
scanning = pytest.importorskip("benchmarks.scanning")
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.serving]
WAIT = 600.0


@pytest.fixture
def run(small_guarded: MakeModel, tmp_path: Path) -> Path:
    model, processor = small_guarded()
    calibrate_on(model, processor, noisy_pictures(12))
    save_run_model(tmp_path / "run", model, processor)
    return tmp_path / "run"


def said(output: Path) -> dict[str, str]:
    table = parquet.read_table(output)
    return dict(zip(table["image"].to_pylist(), table["verdict"].to_pylist(), strict=True))


def test_a_worker_is_killed(run: Path, tmp_path: Path) -> None:
    shards, output, alone = (tmp_path / name for name in ("shards", "output", "alone"))
    shards.mkdir()
    names = scanning.write_shards(shards, 3000, a_shard=100)
    scan = scanning.start_scan(run, shards, output, 2, tmp_path / "log")
    scanning.kill_a_worker(scan, output, after=4)
    assert len(scanning.parts_of(output)) < 30
    assert scan.wait(WAIT) in (0, 1), (tmp_path / "log").read_text()
    counted = scanning.verdicts_of(output)
    assert counted.keys() == names
    assert set(counted.values()) == {1}
    assert scanning.start_scan(run, shards, alone, None, tmp_path / "log").wait(WAIT) in (0, 1)
    assert said(output) == said(alone)


def test_the_scan_itself_is_killed(run: Path, tmp_path: Path) -> None:
    shards, output = tmp_path / "shards", tmp_path / "output"
    shards.mkdir()
    names = scanning.write_shards(shards, 1000, a_shard=100)
    scan = scanning.start_scan(run, shards, output, 2, tmp_path / "log")
    scanning.kill_a_worker(scan, output)
    scan.send_signal(signal.SIGKILL)
    scan.wait(WAIT)
    written = {part: part.stat().st_mtime_ns for part in scanning.parts_of(output)}
    assert 1 <= len(written) < 10
    resumed = scanning.start_scan(run, shards, output, 1, tmp_path / "log", "--resume")
    assert resumed.wait(WAIT) in (0, 1), (tmp_path / "log").read_text()
    assert scanning.verdicts_of(output) == dict.fromkeys(names, 1)
    assert all(part.stat().st_mtime_ns == at for part, at in written.items())


def test_what_a_worker_says_is_said(run: Path, tmp_path: Path) -> None:
    shards, output = tmp_path / "shards", tmp_path / "output"
    shards.mkdir()
    scanning.write_shards(shards, 20, a_shard=10)
    (run / "model" / "model.safetensors").write_bytes(b"")  # which workers alone read
    scan = scanning.start_scan(run, shards, output, 2, tmp_path / "log")
    assert scan.wait(WAIT) == 2
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_ray_that_does_not_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine its parts wait a quarter of a minute for one another, and give up."""
    import ray

    from vqguard.recipes.screening import ray_workers

    started: list[Any] = []

    def init(failures: int) -> Any:
        def start(**settings: Any) -> None:
            started.append(settings)
            if len(started) <= failures:
                raise Exception("The current node timed out during startup.")

        return start

    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", init(2))
    with ray_workers._started(2, None):
        assert [settings["num_cpus"] for settings in started] == [2, 2, 2]
    started.clear()
    monkeypatch.setattr(ray, "init", init(3))
    with (
        pytest.raises(VQGuardError, match=r"did not start: .*timed out.*--workers"),
        ray_workers._started(2, None),
    ):
        pass
    started.clear()
    with pytest.raises(VQGuardError), ray_workers._started(2, "10.0.0.1:6379"):
        pass
    assert len(started) == 1  # somebody else's is not started
