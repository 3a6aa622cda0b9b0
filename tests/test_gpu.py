"""The training on a CUDA device; run where there is one, skipped with the reason elsewhere."""

from pathlib import Path

import pytest
import torch

from modis_dist.config.parse import build
from modis_dist.config.study import Study
from modis_dist.errors import Interrupted
from modis_dist.launch.mlflow.mirror import NullMirror
from modis_dist.launch.ray.cluster import PrivateRay
from modis_dist.launch.ray.tune import RayExecutor
from modis_dist.objective import Rules, adversary_phase, vae_phase
from modis_dist.sweep.driver import run_study
from modis_dist.sweep.monitor import Silent
from modis_dist.sweep.plan import plan
from modis_dist.sweep.resources import Cluster, Node
from modis_dist.train import captured, checkpoint, placement
from modis_dist.train.loop import Ports, fit
from tests.numeric import toy_system
from tests.sweep.toy_study import study_here, tree, write_store
from tests.train import toy
from tests.train.test_loop import StopAt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def test_both_phases_give_the_same_losses_as_on_the_cpu_in_float64() -> None:
    state = toy_system.start((0, 1))
    batch, weights = toy_system.batch(replicates=2), toy_system.weights(("pairwise", "published"))
    for phase in (adversary_phase, vae_phase):
        expected = phase(state.model, batch, weights, Rules())
        found = phase(state.model.to(CUDA), toy_system.moved(batch, CUDA), toy_system.moved(weights, CUDA), Rules())
        state.model.to("cpu")
        for name, value in expected.parts.items():
            assert torch.allclose(found.parts[name].cpu(), value, rtol=1e-9, atol=1e-12), name


def test_a_training_resumes_to_the_bit_on_the_device(tmp_path: Path) -> None:
    def members(folder: Path) -> list:
        return [toy.member(f"t{s}", toy.run(f"seed={s}"), folder) for s in range(2)]

    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    fit(members(calm), folder=calm, device=CUDA)
    with pytest.raises(Interrupted):
        fit(members(stopped), folder=stopped, device=CUDA, ports=Ports(stop=StopAt(7)))
    fit(members(stopped), folder=stopped, device=CUDA)
    ours, theirs = (checkpoint.load(checkpoint.newest(f / "last")).tensors for f in (stopped, calm))
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


def test_two_packs_share_a_gpu_and_end_as_if_each_had_it_alone(tmp_path: Path) -> None:
    store, out = write_store(tmp_path / "store"), tmp_path / "shared"
    alone = study_here(tmp_path / "alone", store, packing={"enabled": False})
    wanted = tree(store, executor="ray", packing={"enabled": False}, resources={"gpus": 0.5})
    study, place = build(Study, wanted, source="study.yaml"), PrivateRay(Cluster("this machine", (Node(2, 1),)))
    with RayExecutor(study.sweep.resources, place=place) as executor:
        assert executor.slots == 2
        planned = plan(study, out=out, slots=executor.slots, source="study.yaml")
        shared = run_study(planned, out=out, executor=executor, mirror=NullMirror(), display=Silent())
    assert shared["failures"] == {} and len(shared["groups"]) == 2
    for ours, theirs in zip(shared["groups"], alone["groups"], strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-6)


def test_recorded_steps_end_as_steps_one_by_one_with_a_learning_rate_that_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: Path) -> dict[str, torch.Tensor]:
        falling = toy.run("optim.lr_schedule=cosine", "optim.epochs=6")
        fit([toy.member("t", falling, folder)], folder=folder, device=CUDA)
        return checkpoint.load(checkpoint.newest(folder / "last")).tensors["model"]

    recorded = trained(tmp_path / "recorded")
    monkeypatch.setattr(captured, "WARM_UP", 10**9)
    for name, tensor in trained(tmp_path / "one by one").items():
        torch.testing.assert_close(recorded[name], tensor, rtol=1e-5, atol=1e-6)
