"""Trainings on several ranks: same results, bit-identical resume after any kill, lost ranks named."""

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from modis_dist.distributed import World
from modis_dist.runtime.errors import Interrupted, RunFailed
from modis_dist.runtime.lock import locked
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.loop import fit
from modis_dist.train.process_group import RankSpec, join_process_group, rendezvous_file
from tests.devices import SINGLE_RANK
from tests.ranks import CONTEXT, LIMIT_S, on_ranks, receive_results, start
from tests.train import toy
from tests.train.test_loop import StopAt

SETTINGS = ("trainer.checkpoint_every=2", "optim.batch_size=7", "optim.lr_schedule=cosine", "trainer.log_every=1")


def train(
    world: World, folder: Path, dtype: torch.dtype = torch.float32, stop: int = 0, device: str = "cpu"
) -> list[Any]:
    """Train a stack of two and return both histories; rank 0 requests a stop at call number ``stop``."""
    members = [toy.member(f"t{s}", toy.run(f"seed={s}", *SETTINGS), folder) for s in range(2)]
    callbacks = Callbacks(stop=StopAt(stop)) if stop else Callbacks()
    try:
        progress = fit(
            members, folder=folder, device=torch.device(device), callbacks=callbacks, dtype=dtype, world=world
        )
    except Interrupted as interruption:
        return [str(interruption)]
    return [member.history for member in progress]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in the last and best checkpoints."""
    checkpoints = {part: checkpoint.load(checkpoint.newest(folder / part)) for part in ("last", "t0/best", "t1/best")}
    return {
        f"{part}/{file}/{name}": tensor
        for part, loaded in checkpoints.items()
        for file, tensors in loaded.tensors.items()
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """Return history and tensors of an uninterrupted training on two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    results = on_ranks(2, train, folder)
    assert results[0] == results[1]
    return json.dumps(results[0]), tensors_of(folder)


def rendezvous(world: World, folder: Path) -> tuple[int, bool]:
    del folder
    world.sum(torch.zeros(1))  # otherwise one rank may exit while the other is still connecting
    return world.rank, world.alone


def test_ranks_rendezvous_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a#b?c%20d é"
    assert on_ranks(2, rendezvous, folder) == [(0, False), (1, False)]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_training_in_float64_is_the_same_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "1").mkdir()
    expected = train(World(), tmp_path / "1", torch.float64)
    want = tensors_of(tmp_path / "1")
    for size in (2, 3):
        results = on_ranks(size, train, tmp_path / str(size), torch.float64)
        for history in results:
            for ours, theirs in zip(history, expected, strict=True):
                assert [row.keys() for row in ours] == [row.keys() for row in theirs]
                for row, right in zip(ours, theirs, strict=True):
                    assert row == pytest.approx(right, rel=1e-8, abs=1e-9)
        resumed = tensors_of(tmp_path / str(size))
        for name, tensor in want.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", SINGLE_RANK)
def test_a_world_of_one_rank_equals_training_without_ranks_and_resumes_bit_identically(
    ranks: tuple[int, str], tmp_path: Path
) -> None:
    size, device = ranks
    torch.set_num_threads(1)
    (tmp_path / "cpu").mkdir()
    expected = train(World(), tmp_path / "cpu", torch.float64)
    (uninterrupted,) = on_ranks(size, train, tmp_path / "uninterrupted", torch.float64, 0, device, device=device)
    for ours, theirs in zip(uninterrupted, expected, strict=True):
        assert all(row == pytest.approx(right, rel=1e-6, abs=1e-7) for row, right in zip(ours, theirs, strict=True))
    (message,) = on_ranks(size, train, tmp_path / "stopped", torch.float64, 5, device, device=device)
    assert message[0].startswith("stop requested; saved")
    (tmp_path / "stopped" / "ranks").unlink(missing_ok=True)
    assert on_ranks(size, train, tmp_path / "stopped", torch.float64, 0, device, device=device) == [uninterrupted]
    want, resumed = tensors_of(tmp_path / "uninterrupted"), tensors_of(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_all_ranks_stop_at_the_same_step_and_resume_bit_identically(
    stop: int, tmp_path: Path, uninterrupted: Any
) -> None:
    messages = on_ranks(2, train, tmp_path, torch.float32, stop)
    assert messages[0] == messages[1] and messages[0][0].startswith("stop requested; saved")
    (tmp_path / "ranks").unlink()
    results = on_ranks(2, train, tmp_path)
    assert json.dumps(results[0]) == uninterrupted[0]
    resumed = tensors_of(tmp_path)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted[1].items())


def train_with_signal(world: World, folder: Path, rank: int, step: int, number: int) -> Any:
    """Run ``train``, and send a rank a signal before a step."""
    from modis_dist.train.loader import Loader

    batch, calls = Loader.batch, 0

    def counted(self: Loader, **position: int) -> Any:
        nonlocal calls
        calls += 1
        if world.rank == rank and calls == step:
            os.kill(os.getpid(), number)
            time.sleep(LIMIT_S if number == signal.SIGSTOP else 0)
        return batch(self, **position)

    Loader.batch = counted  # type: ignore[method-assign]
    return train(world, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(1, 1), (0, 6), (1, 9)])
def test_after_a_rank_is_killed_the_others_name_it_and_the_training_resumes_bit_identically(
    rank: int, step: int, tmp_path: Path, uninterrupted: Any
) -> None:
    processes, pipes = start(2, train_with_signal, tmp_path, rank, step, signal.SIGKILL)
    (_, error), pid = receive_results(pipes)[1 - rank], processes[rank].pid
    assert f"RankLost: rank {rank} of 2 (process {pid} on " in error and "is gone" in error
    (tmp_path / "ranks").unlink()
    results = on_ranks(2, train, tmp_path)
    assert json.dumps(results[0]) == uninterrupted[0]
    resumed = tensors_of(tmp_path)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_after_the_timeout(rank: int, tmp_path: Path) -> None:
    processes, pipes = start(2, train_with_signal, tmp_path, rank, 4, signal.SIGSTOP, timeout_s=3.0)
    try:
        (_, error) = receive_results([pipes[1 - rank]])[0]
    finally:
        processes[rank].kill()
    assert f"RankLost: rank {rank} of 2 (process {processes[rank].pid} on " in error
    assert " 3 s" in error and "(SIGSTOP)" in error


def slow(world: World, folder: Path, number: int) -> None:
    """Send rank 0 a signal while the others wait for its slow broadcast."""
    del folder
    world.broadcast_when_done(lambda: 1)
    world.broadcast_when_done(lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGSTOP, "for 3 s: it is stopped"), (signal.SIGKILL, "is gone")]
)
def test_a_rank_0_that_hangs_or_dies_while_the_others_wait_for_it_is_named(
    number: int, expected: str, tmp_path: Path
) -> None:
    processes, pipes = start(2, slow, tmp_path, number, timeout_s=3.0)
    try:
        (_, error) = receive_results([pipes[1]])[0]
    finally:
        processes[0].kill()
    assert error.startswith(f"RankLost: rank 0 of 2 (process {processes[0].pid} on ") and expected in error


def waiting(world: World, folder: Path) -> int:
    del folder
    return world.broadcast_when_done(lambda: time.sleep(2.5) or 7)


def test_the_others_wait_for_a_slow_rank_0(tmp_path: Path) -> None:
    assert on_ranks(2, waiting, tmp_path, timeout_s=1.0) == [7, 7]


def lock_taken_folder(world: World, folder: Path) -> None:
    """Lock a folder that another process uses."""
    with ExitStack() as stack:
        world.only_on_rank_0(lambda: stack.enter_context(locked(folder / "taken", patience_s=0)))


def test_a_locked_folder_is_refused_on_every_rank_at_once(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with locked(tmp_path / "taken"):
        _, pipes = start(3, lock_taken_folder, tmp_path)
        assert all(f"process {os.getpid()} on " in error for _, error in receive_results(pipes))


def listeners(rank: int, folder: Path, interface: str, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    with join_process_group(RankSpec(rank, 2, rendezvous_file(folder)), device=toy.CPU) as world:
        world.broadcast(lambda: 1)
        connections = psutil.Process().net_connections("tcp")
        pipe.send([connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN])


def test_ranks_with_a_rendezvous_file_listen_on_loopback_only_whatever_interface_the_cluster_sets(
    tmp_path: Path,
) -> None:
    others = [name for name in psutil.net_if_addrs() if name != "lo"]
    if not others:
        pytest.skip("this machine has no interface but loopback")
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    ranks = [CONTEXT.Process(target=listeners, args=(r, tmp_path, others[0], pipes[r][1]), daemon=True) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for reader, _ in pipes:
        assert reader.poll(LIMIT_S)
        assert set(reader.recv()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    for rank in ranks:
        rank.join(LIMIT_S)
        assert rank.exitcode == 0


def train_with_nan(world: World, folder: Path) -> Any:
    """Train with a NaN in a row of the second rank's block in every batch from the third on."""
    from modis_dist.train.loader import Loader

    batch, calls = Loader.batch, 0

    def with_nan(self: Loader, **position: int) -> Any:
        nonlocal calls
        calls += 1
        drawn = batch(self, **position)
        if world.rank == 1 and calls >= 3 and len(drawn.x[0]) == 2:
            drawn.x[0][1, 0, 0] = float("nan")
        return drawn

    Loader.batch = with_nan  # type: ignore[method-assign]
    members = [toy.member(f"t{s}", toy.run(f"seed={s}", *SETTINGS), folder) for s in range(2)]
    return [(p.status, p.reason) for p in fit(members, folder=folder, device=toy.CPU, world=world)]


def test_a_non_finite_loss_on_one_rank_fails_only_its_member_and_on_all_ranks(tmp_path: Path) -> None:
    first, second = on_ranks(2, train_with_nan, tmp_path)
    assert first == second
    assert first[0] == ("done", None)
    assert first[1][0] == "failed" and first[1][1].startswith("step 3: class_d/mirna is nan")


def raise_on_rank_1(world: World, folder: Path) -> None:
    del folder
    world.broadcast(lambda: 1)
    if world.rank == 1:
        raise ZeroDivisionError("on rank 1")
    world.broadcast(lambda: 2)
    world.sum(torch.zeros(1))


def test_an_error_of_one_rank_is_not_reported_as_a_lost_rank(tmp_path: Path) -> None:
    _, pipes = start(2, raise_on_rank_1, tmp_path, timeout_s=3.0)
    (_, first), (_, second) = receive_results(pipes)
    assert second.startswith("ZeroDivisionError: on rank 1")
    assert "rank 1 of 2 " in first and "ZeroDivisionError: on rank 1" in first


def raise_on_rank_0(world: World, folder: Path) -> None:
    del folder

    def fail() -> None:
        raise RunFailed("on the first rank")

    world.broadcast(fail)


def test_an_error_on_rank_0_is_raised_on_all_ranks(tmp_path: Path) -> None:
    _, pipes = start(3, raise_on_rank_0, tmp_path)
    assert all(error.startswith("RunFailed: on the first rank") for _, error in receive_results(pipes))
