"""The journal keeps every complete record, in order, despite kills, full disks and damaged bytes."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.train.journal import JournalReader, JournalWriter, read


def write(path: Path, *steps: int, trial: str = "t") -> None:
    writer = JournalWriter(path)
    for step in steps:
        writer.metrics(trial, step=step, values={"loss": 1 / (step + 1)})
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text(max_size=5), st.dictionaries(st.text(max_size=5), st.floats(), max_size=4)), max_size=6
    )
)
def test_records_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    writer = JournalWriter(path)
    for step, (trial, values) in enumerate(rows):
        writer.metrics(trial, step=step, values=values)
    writer.close()
    entries = [(r["trial"], r["step"], r["values"]) for r in read(path)]
    assert repr(entries) == repr(
        [(trial, step, dict(sorted(values.items()))) for step, (trial, values) in enumerate(rows)]
    )


def test_every_line_is_strict_json_with_a_crc_that_another_program_can_check(path: Path) -> None:
    writer = JournalWriter(path)
    writer.metrics("t", step=3, values={"a": math.nan, "b": -math.inf, "c": 0.1})
    writer.event("t", kind="end", values={"status": "FINISHED", "nested": [math.inf, {"x": math.nan}]})
    writer.close()
    for line in path.read_text().splitlines():
        text = line.partition('"record": ')[2][:-1]
        outer = json.loads(line, parse_constant=pytest.fail)
        assert int(outer["crc"], 16) == zlib.crc32(text.encode())
    metrics, end = read(path)
    assert math.isnan(metrics["values"]["a"]) and metrics["values"]["b"] == -math.inf
    assert end["values"] == {"status": "FINISHED", "nested": ["inf", {"x": "nan"}]}
    assert set(metrics) == {"kind", "trial", "time_ms", "step", "values"}


def test_a_torn_last_line_is_dropped_and_the_next_writer_starts_a_new_one(path: Path) -> None:
    write(path, 0, 1)
    whole = path.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole[:size])
        assert [r["step"] for r in read(path)] == [0]
        write(path, 2)
        assert [r["step"] for r in read(path)] in ([0, 2], [0, 1, 2])  # the latter: only the line end was missing


def test_flipped_bits_never_give_a_wrong_number(path: Path) -> None:
    write(path, *range(5))
    whole, truth, draw = path.read_bytes(), read(path), random.Random(0)
    for _ in range(300):
        bad = bytearray(whole)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        reader = JournalReader(path)
        records = reader.new()
        assert all(record in truth for record in records)
        assert len(records) >= 3


def test_a_corrupt_line_in_the_middle_is_skipped_and_counted(path: Path) -> None:
    write(path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"not json\n" + lines[1].replace(b"0.5", b"0.6") + b"[1]\n" + lines[2])
    reader = JournalReader(path)
    assert [r["step"] for r in reader.new()] == [0, 2]
    assert reader.skipped == 3


def test_of_an_epoch_written_twice_the_first_record_counts_per_trial(path: Path) -> None:
    write(path, 0, 1, 2)
    first = read(path)
    write(path, 1, 2, 3)
    write(path, 1, trial="other")
    assert read(path)[:3] == first
    assert [(r["trial"], r["step"]) for r in read(path)][3:] == [("t", 3), ("other", 1)]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_reading_in_parts_equals_reading_at_once(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    write(path, *range(10), 4, 5)
    whole, growing = path.read_bytes(), path.with_name("growing")
    reader = JournalReader(growing)
    pieces = reader.new()
    for cut in [*sorted(cuts), len(whole)]:
        growing.write_bytes(whole[:cut])
        pieces += reader.new()
    assert pieces == read(path)


def test_a_killed_writer_loses_no_acknowledged_record(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from modis_dist.train.journal import JournalWriter\n"
        "w = JournalWriter(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n    w.metrics('t', step=step, values={'a': 1.0})\n    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        acknowledged = 0
        while acknowledged < 200:
            acknowledged = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split("\n")[:-1])])
    steps = [r["step"] for r in read(path)]
    assert steps == list(range(len(steps))) and steps[-1] >= acknowledged


def test_records_refused_by_a_full_disk_are_written_once_there_is_space(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, 0)
    real = os.write
    with JournalWriter(path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: real(file, data[:20]))
            for step in (1, 2):
                writer.metrics("t", step=step, values={"a": 1.0})
        assert caplog.text.count(os.strerror(errno.ENOSPC)) == 1
        writer.metrics("t", step=3, values={"a": 1.0})
    assert [r["step"] for r in read(path)] == [0, 1, 2, 3]


def test_an_incomplete_journal_is_never_reported_as_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda _, data: len(data) // 2)
        with pytest.raises(OSError, match="journal") as refused:
            writer.event("t", kind="end", values={})
        assert refused.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as refused:
            writer.close()
        assert refused.value.errno == errno.ENOSPC
    with pytest.raises(KeyError), JournalWriter(path) as other:
        monkeypatch.setattr(os, "fsync", _failing)
        raise KeyError(other)  # is not hidden by an error on closing


def _failing(_: int) -> None:
    raise OSError(5, "Input/output error")


def test_the_file_is_private_and_a_missing_one_is_empty(path: Path) -> None:
    assert read(path) == []
    write(path, 0)
    assert path.stat().st_mode & 0o077 == 0
