"""The training on a CUDA device; run where there is one, skipped with the reason elsewhere.

Tests of other files that run on the CPU and on a GPU (captured steps, lower precision) have the same mark:
`pytest -m gpu` runs all.
"""

import gc
import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from modis_dist.config.parse import build
from modis_dist.config.study import Study
from modis_dist.distributed import ALONE
from modis_dist.execution.resources import Cluster, Node
from modis_dist.integrations.ray.private_cluster import PrivateRay
from modis_dist.integrations.ray.tune import RayExecutor
from modis_dist.objective import Batch, Rules, Terms, Weights, adversary_phase, vae_phase
from modis_dist.runtime.errors import Interrupted
from modis_dist.study.plan import plan
from modis_dist.study.run import run_study
from modis_dist.train import checkpoint, cuda_graph, placement
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.loop import fit
from modis_dist.train.loss_log import LossLog
from modis_dist.train.state import Setup, TrainState
from tests.numeric import toy_system
from tests.study.toy_study import Silent, run_toy_study, tree, write_store
from tests.train import toy
from tests.train.test_loop import StopAt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def test_both_phases_give_the_same_losses_as_on_the_cpu_in_float64() -> None:
    state = toy_system.start((0, 1))
    batch, weights = toy_system.batch(slots=2), toy_system.weights(("pairwise", "published"))
    for phase in (adversary_phase, vae_phase):
        expected = phase(state.model, batch, weights, Rules())
        found = phase(state.model.to(CUDA), toy_system.moved(batch, CUDA), toy_system.moved(weights, CUDA), Rules())
        state.model.to("cpu")
        for name, value in expected.parts.items():
            assert torch.allclose(found.parts[name].cpu(), value, rtol=1e-9, atol=1e-12), name


def test_a_training_resumes_to_the_bit_on_the_device(tmp_path: Path) -> None:
    def members(folder: Path) -> list:
        return [toy.member(f"t{s}", toy.run(f"seed={s}"), folder) for s in range(2)]

    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    fit(members(uninterrupted), folder=uninterrupted, device=CUDA)
    with pytest.raises(Interrupted):
        fit(members(stopped), folder=stopped, device=CUDA, callbacks=Callbacks(stop=StopAt(7)))
    fit(members(stopped), folder=stopped, device=CUDA)
    ours, theirs = (checkpoint.load(checkpoint.newest(f / "last")).tensors for f in (stopped, uninterrupted))
    for part, tensors in theirs.items():
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part


def test_features_that_wait_beside_the_gpu_train_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fits in (True, False):
        monkeypatch.setattr(placement, "fits_beside_training", lambda *_, fits=fits, **__: fits)
        folder = tmp_path / str(fits)
        members = [toy.member(f"t{s}", toy.run(f"seed={s}", f"data.split.seed={s}"), folder) for s in range(2)]
        progress = fit(members, folder=folder, device=CUDA)
        found.append((checkpoint.load(checkpoint.newest(folder / "last")).tensors, [p.history for p in progress]))
    (ours, our_history), (theirs, their_history) = found
    assert our_history == their_history
    for part, tensors in theirs.items():
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part


def test_two_packs_that_share_a_gpu_are_bit_identical_to_separate_ones(tmp_path: Path) -> None:
    store, out = write_store(tmp_path / "store"), tmp_path / "shared"
    alone = run_toy_study(tmp_path / "alone", store, packing={"enabled": False})
    wanted = tree(store, executor="ray", packing={"enabled": False}, resources={"gpus": 0.5})
    study, place = build(Study, wanted, source="study.yaml"), PrivateRay(Cluster("this machine", (Node(2, 1),)))
    with RayExecutor(study.sweep.resources, backend=place) as executor:
        assert executor.slots == 2
        planned = plan(study, out=out, slots=executor.slots, source="study.yaml")
        shared = run_study(planned, out=out, executor=executor, display=Silent())
    assert shared["failures"] == {} and len(shared["groups"]) == 2
    for ours, theirs in zip(shared["groups"], alone["groups"], strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-6)


def test_stacks_that_are_made_one_after_the_other_take_no_more_of_the_gpu_than_the_first() -> None:
    held = []
    for _ in range(5):
        state, how, given = start_on_the_gpu()
        for _ in range(cuda_graph.WARM_UP + 2):
            toy_system.step(state, given, how, Rules())
        del state, how, given
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert max(held[1:]) <= held[0]


def start_on_the_gpu() -> tuple[TrainState, Weights, Batch]:
    state = TrainState.start(toy_system.SHAPE, [0], Setup(toy_system.OPTIM, CUDA, torch.float64))
    return state, toy_system.moved(toy_system.weights(), CUDA), toy_system.moved(toy_system.batch(), CUDA)


def test_after_a_failed_capture_steps_run_directly_with_one_warning() -> None:
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn")
    ) as apart:  # of which the allocator is not to be used again
        message, stream_restored, equal = apart.submit(waits_for_the_device).result()
    assert message and "previous error" not in message
    assert stream_restored and equal


def test_a_step_from_batch_to_loss_log_never_waits_for_the_gpu() -> None:
    data = toy_system.prepared(dict.fromkeys(toy_system.SHAPE.features, 60))
    loader = toy_system.loader([data, data], range(2), batch_size=toy_system.ROWS, fraction=0.25, device=CUDA)
    state = TrainState.start(toy_system.SHAPE, range(2), Setup(toy_system.OPTIM, CUDA, torch.float64))
    how = toy_system.moved(toy_system.weights(("pairwise",) * 2), CUDA)
    log = LossLog(list(toy_system.SHAPE.features), slots=2, window=100, world=ALONE)

    def take(step: int) -> None:
        log.record(*toy_system.step(state, loader.batch(epoch=0, step=step), how, Rules()))

    captured = cuda_graph.WARM_UP + 2
    for step in range(captured):
        take(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(captured)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def wait(_: object, __: object, terms: Terms) -> None:
    terms.loss.sum().item()


def waits_for_the_device() -> tuple[str, bool, bool]:
    """Return the warning, whether the current stream was restored, and whether the steps equal others."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(cuda_graph.__name__).addHandler(handler)
    around = torch.cuda.current_stream()
    found = []
    for waits in (True, False):
        state, how, given = start_on_the_gpu()
        phase = state.vaes._phase
        if waits:
            phase.register_forward_hook(wait)
        for _ in range(cuda_graph.WARM_UP + 3):
            toy_system.step(state, given, how, Rules())
        found.append([parameter.cpu() for parameter in state.model.parameters()])
    equal = all(torch.allclose(*pair, rtol=1e-9) for pair in zip(*found, strict=True))
    (message,) = said
    return message, torch.cuda.current_stream() == around, equal
