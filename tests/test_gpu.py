"""Training on a CUDA device; skipped without one.

Tests of other files that also run on a GPU (captured steps, lower precision) have the same mark: `pytest -m gpu`
runs all.
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
        terms = phase(state.model.to(CUDA), toy_system.moved(batch, CUDA), toy_system.moved(weights, CUDA), Rules())
        state.model.to("cpu")
        for name, value in expected.parts.items():
            assert torch.allclose(terms.parts[name].cpu(), value, rtol=1e-9, atol=1e-12), name


def test_a_training_resumes_bit_identically_on_the_device(tmp_path: Path) -> None:
    def members(folder: Path) -> list:
        return [toy.member(f"t{s}", toy.run(f"seed={s}"), folder) for s in range(2)]

    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    fit(members(uninterrupted), folder=uninterrupted, device=CUDA)
    with pytest.raises(Interrupted):
        fit(members(stopped), folder=stopped, device=CUDA, callbacks=Callbacks(stop=StopAt(7)))
    fit(members(stopped), folder=stopped, device=CUDA)
    tensors_by_part, expected = (
        checkpoint.load(checkpoint.newest(f / "last")).tensors for f in (stopped, uninterrupted)
    )
    for part, tensors in expected.items():
        assert all(torch.equal(tensors_by_part[part][name], tensor) for name, tensor in tensors.items()), part


def test_features_in_host_memory_and_on_the_gpu_give_bit_identical_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for fits in (True, False):
        monkeypatch.setattr(placement, "fits_beside_training", lambda *_, fits=fits, **__: fits)
        folder = tmp_path / str(fits)
        members = [toy.member(f"t{s}", toy.run(f"seed={s}", f"data.split.seed={s}"), folder) for s in range(2)]
        progress = fit(members, folder=folder, device=CUDA)
        outcomes.append((checkpoint.load(checkpoint.newest(folder / "last")).tensors, [p.history for p in progress]))
    (tensors_by_part, history), (expected, expected_history) = outcomes
    assert history == expected_history
    for part, tensors in expected.items():
        assert all(torch.equal(tensors_by_part[part][name], tensor) for name, tensor in tensors.items()), part


def test_two_packs_that_share_a_gpu_are_bit_identical_to_separate_ones(tmp_path: Path) -> None:
    store, out = write_store(tmp_path / "store"), tmp_path / "shared"
    separate = run_toy_study(tmp_path / "alone", store, packing={"enabled": False})
    settings = tree(store, executor="ray", packing={"enabled": False}, resources={"gpus": 0.5})
    study, backend = build(Study, settings, source="study.yaml"), PrivateRay(Cluster("this machine", (Node(2, 1),)))
    with RayExecutor(study.sweep.resources, backend=backend) as executor:
        assert executor.slots == 2
        planned = plan(study, out=out, slots=executor.slots, source="study.yaml")
        shared = run_study(planned, out=out, executor=executor, display=Silent())
    assert shared["failures"] == {} and len(shared["groups"]) == 2
    for group, expected in zip(shared["groups"], separate["groups"], strict=True):
        assert group["mean"] == pytest.approx(expected["mean"], abs=1e-6)


def test_consecutive_stacks_allocate_no_more_gpu_memory_than_the_first() -> None:
    allocated = []
    for _ in range(5):
        state, loss_weights, inputs = start_on_the_gpu()
        for _ in range(cuda_graph.WARM_UP + 2):
            toy_system.step(state, inputs, loss_weights, Rules())
        del state, loss_weights, inputs
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[1:]) <= allocated[0]


def start_on_the_gpu() -> tuple[TrainState, Weights, Batch]:
    state = TrainState.start(toy_system.SHAPE, [0], Setup(toy_system.OPTIM, CUDA, torch.float64))
    return state, toy_system.moved(toy_system.weights(), CUDA), toy_system.moved(toy_system.batch(), CUDA)


def test_after_a_failed_capture_steps_run_directly_with_one_warning() -> None:
    # A separate process: its CUDA allocator is unusable after a failed capture.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        message, stream_restored, equal = executor.submit(steps_that_cannot_be_captured).result()
    assert message and "previous error" not in message
    assert stream_restored and equal


def test_a_step_from_batch_to_loss_log_never_synchronises_with_the_gpu() -> None:
    data = toy_system.prepared(dict.fromkeys(toy_system.SHAPE.features, 60))
    loader = toy_system.loader([data, data], range(2), batch_size=toy_system.ROWS, fraction=0.25, device=CUDA)
    state = TrainState.start(toy_system.SHAPE, range(2), Setup(toy_system.OPTIM, CUDA, torch.float64))
    loss_weights = toy_system.moved(toy_system.weights(("pairwise",) * 2), CUDA)
    log = LossLog(list(toy_system.SHAPE.features), slots=2, window=100, world=ALONE)

    def run_step(step: int) -> None:
        log.record(*toy_system.step(state, loader.batch(epoch=0, step=step), loss_weights, Rules()))

    captured = cuda_graph.WARM_UP + 2
    for step in range(captured):
        run_step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(captured)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronise(_: object, __: object, terms: Terms) -> None:
    terms.loss.sum().item()


def steps_that_cannot_be_captured() -> tuple[str, bool, bool]:
    """Return the warning, and whether the current stream was restored and the parameters equal those of a replay."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(cuda_graph.__name__).addHandler(handler)
    original_stream = torch.cuda.current_stream()
    parameters = []
    for synchronises in (True, False):
        state, loss_weights, inputs = start_on_the_gpu()
        phase = state.vaes._phase
        if synchronises:
            phase.register_forward_hook(synchronise)
        for _ in range(cuda_graph.WARM_UP + 3):
            toy_system.step(state, inputs, loss_weights, Rules())
        parameters.append([parameter.cpu() for parameter in state.model.parameters()])
    equal = all(torch.allclose(*pair, rtol=1e-9) for pair in zip(*parameters, strict=True))
    (message,) = messages
    return message, torch.cuda.current_stream() == original_stream, equal
