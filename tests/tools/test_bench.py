"""Benchmarks: the baseline trains like the package, counts and fits are correct. No times are asserted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modis_dist.model.layers import count_parameters
from modis_dist.model.networks import Modis, Shape
from tests.devices import DEVICES
from tests.shapes import checked
from tools.bench import counts, growth, ours, profiled, ranks, roofline, show
from tools.bench.__main__ import COMMANDS, main
from tools.bench.baseline import Baseline, Rows, loaders, train_epoch
from tools.bench.measure import Measured, Watch, exponent
from tools.bench.shapes import CASES, Setting

CPU = torch.device("cpu")
KEYS = {"shape", "batch", "precision", "threads", "baseline_ms", "ours_ms", "ratio"}
TINY = Setting("tiny", CASES["tiny"], batch=8, precision="fp32", threads=1, device=CPU, loss="published")
QUICK = ["--shapes", "tiny", "--batches", "4", "--threads", "1", "--turns", "2", "--json"]


@pytest.fixture(autouse=True)
def _one_call_per_turn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time a single call per turn, on one thread; restore the number of threads afterwards."""
    monkeypatch.setattr("tools.bench.measure.pieces_per_turn", lambda *_: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_start(setting: Setting, dtype: torch.dtype) -> tuple[Baseline, ours.Training]:
    """Return the baseline and a training of the package with the same initial weights."""
    training, system = ours.Training(setting, dtype=dtype), Baseline(setting, dtype=dtype)
    for (_, plain), (_, stacked) in pairs(system, training):
        plain.copy_(stacked)
    return system, training


def pairs(system: Baseline, training: ours.Training) -> list[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pair the named parameters and statistics of the baseline with those of the package, in the order of layers."""
    plain = [(name, tensor) for name, tensor in system.state_dict().items() if not name.endswith("num_batches_tracked")]
    stacked = [(name, tensor[0]) for name, tensor in training.state.model_tensors().items()]
    assert [tensor.shape for _, tensor in plain] == [tensor.shape for _, tensor in stacked]
    return list(zip(plain, stacked, strict=True))


@pytest.mark.parametrize("loss", ["published", "pairwise"])
def test_losses_and_steps_of_the_baseline_equal_those_of_the_package(loss) -> None:
    setting = replace(TINY, loss=loss)
    system, training = same_start(setting, torch.float64)
    batch = ours.random_batch(setting, dtype=torch.float64)
    for _ in range(2):
        with checked():
            terms = ours.plain_terms(*training.learn(batch), setting.case)
            expected = system.learn(ours.plain_batch(batch))
        assert terms.keys() == expected.keys()
        assert len(terms) == 2 + 7 * len(setting.case.shape.features)
        for name, value in terms.items():
            assert value == pytest.approx(expected[name], rel=1e-10), name
    for (name, plain), (_, stacked) in pairs(system, training):
        torch.testing.assert_close(plain, stacked, rtol=0, atol=1e-9, msg=name)


def test_losses_of_the_baseline_in_bf16_are_close_to_those_of_the_package() -> None:
    setting = replace(TINY, precision="bf16")
    system, training = same_start(setting, torch.float32)
    batch = ours.random_batch(setting)
    terms = ours.plain_terms(*training.learn(batch), setting.case)
    expected = system.learn(ours.plain_batch(batch))
    for name, value in terms.items():
        assert value == pytest.approx(expected[name], rel=0.05, abs=1e-3), name


@pytest.mark.parametrize(("name", "total"), [("intersim", 2_064_792), ("tcga10", 79_970_175)])
def test_baseline_and_package_have_the_parameter_counts_of_table_s2(name, total) -> None:
    case = CASES[name]
    with torch.device("meta"):
        system = Baseline(replace(TINY, case=case, device=torch.device("meta")))
        model = Modis(case.shape)
    assert sum(parameter.numel() for parameter in system.parameters()) == total
    assert count_parameters(model) == total
    assert counts.parameters(case.shape) == total


def test_an_epoch_of_the_baseline_has_as_many_batches_as_one_of_the_package() -> None:
    data = ours.random_rows(TINY.case, limit=20)
    data_loaders = loaders(data.values(), batch=TINY.batch)
    assert [len(entry) for entry in data_loaders] == [2, 2, 2]
    assert ours.loader(TINY, data).steps == 2
    means = train_epoch(Baseline(TINY), data_loaders)
    assert all(torch.tensor(value).isfinite() for value in means.values())


def test_an_item_of_the_baseline_data_set_is_one_sample() -> None:
    x, label = Rows(torch.arange(6.0).view(3, 2), torch.tensor([4, 5, 6]))[1]
    assert (x.tolist(), label.item()) == ([2.0, 3.0], 5)


def test_operation_counts_equal_those_counted_by_hand() -> None:
    # Encoder 3 -> 4, two heads 4 -> 2; decoder 2 -> 4 -> 3; discriminator 2 -> 5, heads 5 -> 2 and 5 -> 2; 6 rows each.
    shape = Shape({"a": 3, "b": 3}, {"a": (4,), "b": (4,)}, latent=2, classes=2, discriminator=(5,))
    encoder, decoder = 3 * 4 + 2 * 4 * 2, 2 * 4 + 4 * 3
    trunk, head = 2 * 5, 5 * 2
    penalty = (trunk + head) + trunk + (trunk + head)
    phase_d = 2 * 6 * 3 * encoder + 12 * ((trunk + 2 * head) + penalty + (trunk + 2 * head) + 2 * head)
    phase_g = 2 * 6 * (3 * (encoder + decoder) - 3 * 4) + 12 * 2 * (trunk + 2 * head)  # no gradient of x
    similarity, overlap = 3 * 6 * 6 * 5, 3 * (6 * 6 * 2) + 3 * (6 * 2 * 2)
    of_clustering = 2 * 2 * (similarity + 2 * overlap)  # of two modalities in two phases
    assert counts.operations(shape, rows=6) == 2 * (phase_d + phase_g + of_clustering)
    lower = {entry: times for entry, times in counts.products(shape, rows=6).items() if entry.lower}
    assert sum(entry.operations * times for entry, times in lower.items()) == 2 * phase_g
    assert counts.parameters(shape) == 2 * ((16 + 2 * 10) + (12 + 15) + 2 * 4) + 15 + 12 + 12


class OperationCounter(TorchDispatchMode):
    """Counts the operations of matrix products inside the block."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        del types
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.operations += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


class ProductCounter(TorchDispatchMode):
    """Counts the matrix products inside the block."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        del types
        self.calls += func._overloadpacket in flop_registry
        return func(*args, **(kwargs or {}))


def test_a_step_runs_exactly_the_counted_products() -> None:
    training, batch = ours.Training(TINY), ours.random_batch(TINY)
    with OperationCounter() as counting:
        training.learn(batch)
    assert counting.operations == counts.operations(TINY.case.shape, rows=TINY.batch)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_fitted_exponent_is_that_of_the_power_law(power) -> None:
    assert exponent({size: 3.7 * size**power for size in (1, 2, 5, 40)}) == pytest.approx(power, abs=1e-12)


def test_the_ratio_is_of_medians_and_its_spread_over_turns() -> None:
    measured = Measured({"a": (2.0, 4.0, 60.0), "b": (1.0, 2.0, 20.0)}, others=0.0)
    assert measured.ratio("a", "b") == 2.0
    assert measured.spread("a", "b") == (2.0, 2.5)
    assert measured.quiet


@pytest.mark.parametrize(("times", "others"), [((2.0, 3.0, 1.0), 1.0), ((2.0, 0.9, 1.0), 0.0), ((2.0, 0.0, 1.0), None)])
def test_cores_used_by_others_are_busy_cores_minus_those_of_this_process(monkeypatch, times, others) -> None:
    readings = iter([(0.0, 0.0, 0.0), times])
    monkeypatch.setattr("tools.bench.measure.cpu_times", lambda: next(readings))
    assert Watch().others() == others


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("command", ["step", "epoch", "pack", "roofline"])
def test_each_command_prints_rows_as_json(command, device, capsys) -> None:
    assert main([command, *QUICK, "--device", device]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row.keys() >= KEYS for row in rows)
    assert {row["shape"] for row in rows} == {"tiny"}
    assert all(row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"]) for row in rows)


def test_growth_has_a_row_for_each_size_and_an_exponent(monkeypatch, capsys) -> None:
    monkeypatch.setattr(growth, "BASE", {"modalities": 2, "features": 8, "latent": 4})
    small = {"batch": (4, 8), "latent": (2, 4), "modalities": (2, 3), "features": (8, 16), "replicates": (1, 2)}
    monkeypatch.setattr(growth, "SIZES", small)
    assert main(["growth", "--vary", *small, "--threads", "1", "--turns", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["varied"], row["size"]) for row in rows] == [(kind, n) for kind, sizes in small.items() for n in sizes]
    assert all(row.keys() >= KEYS | {"exponent"} for row in rows)
    assert [row["batch"] for row in rows] == [4, 8] + 8 * [growth.BATCH]


@pytest.mark.parametrize("device", DEVICES)
def test_a_profile_has_shares_of_groups_that_sum_to_1_and_the_slowest_operators(device, capsys) -> None:
    options = ["--shapes", "tiny", "--batches", "4", "--threads", "1", "--steps", "2", "--replicates", "1", "2"]
    assert main(["profile", *options, "--top", "3", "--device", device, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for replicates in (1, 2):
        of_stack = [row for row in rows if row["replicates"] == replicates]
        groups, operators = of_stack[:-3], of_stack[-3:]
        assert {row["group"] for row in groups} == {*profiled.GROUPS, "other"}
        assert {row["operator"] for row in groups} == {"all"}
        assert sum(row["fraction"] for row in groups) == pytest.approx(1)
        assert [row["ms"] for row in operators] == sorted((row["ms"] for row in operators), reverse=True)
        assert all(row["calls"] > 0 for row in of_stack)
        assert all(row["ms"] > 0 for row in of_stack if row["group"] != "other")  # on a GPU, views launch no kernel


def test_the_floor_on_a_gpu_is_the_time_of_a_graph_divided_by_its_repeats(monkeypatch) -> None:
    graphs = []

    def captured(step, *, times) -> object:
        graphs.append(times)
        return step

    measured = Measured({"it": (30.0, 10.0, 20.0)}, others=0.0)
    monkeypatch.setattr(roofline, "captured", captured)
    monkeypatch.setattr(roofline, "interleaved", lambda works, **_: works["it"](1) or measured)
    cuda = torch.device("cuda")
    assert roofline.floor_ms(list, cuda, turns=3) == pytest.approx(20.0 / roofline.IN_A_GRAPH)
    assert roofline.floor_ms(list, CPU, turns=3) == 20.0
    assert graphs == [roofline.IN_A_GRAPH]


def test_a_profile_counts_the_calls_of_one_step() -> None:
    calls = {entry.operator: entry.calls for entry in profiled.spent(TINY, replicates=1, steps=2)}
    assert calls["aten::_fused_adam_"] == 2
    training, batch = ours.Training(TINY), ours.random_batch(TINY)
    training.learn(batch)
    with ProductCounter() as counting:
        training.learn(batch)
    assert sum(calls.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm", "baddbmm")) == counting.calls


def test_ranks_step_on_request_and_exit() -> None:
    with ranks.stepping(TINY, size=2) as work:
        work(2)


def test_a_table_is_printed_without_the_json_option(capsys) -> None:
    assert main(["step", *QUICK[:-1]]) == 0
    assert "ratio" in capsys.readouterr().out


def test_the_readme_names_every_command() -> None:
    page = (Path(__file__).resolve().parents[2] / "tools" / "bench" / "README.md").read_text()
    assert all(f"python -m tools.bench {name}" in page for name in COMMANDS)


def test_rows_of_every_measurement_have_the_common_keys() -> None:
    (row,) = json.loads(show.as_json([{"ours_ms": 3.0, "way": "stacked"}]))
    assert row == {**dict.fromkeys(KEYS), "ours_ms": 3.0, "way": "stacked"}


@pytest.mark.slow
def test_a_large_store_is_imported_read_and_trained_from(tmp_path: Path, capsys) -> None:
    size = ["--rows", "200", "--features", "20", "--row-group-rows", "100", "--folder", str(tmp_path)]
    work = ["--turns", "1", "--feature-storage", "disk", "--width", "8", "--batch", "8", "--steps", "3", "--json"]
    assert main(["import", *size, *work]) == 0
    rows = {row["work"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows)[:3] == ["data import", "data check", "data describe"] and len(rows) == 3 + 2 * 5 + 1
    for name in ("data import", "data check", "data describe", "train, disk"):
        assert 50 < rows[name]["peak_MiB"] < 5000 and rows[name]["ours_ms"] > 0
    for cache in ("cold", "warm"):
        ours, plain = rows[f"Store.batches, {cache}"], rows[f"pyarrow, {cache}"]
        assert ours["ratio"] == pytest.approx(plain["ours_ms"] / ours["ours_ms"])
        assert plain["ratio"] is None and plain["MB_s"] == pytest.approx(16e-3 / plain["ours_ms"] * 1000)
    assert rows["train, disk"]["steps_s"] > 0 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_study_is_timed_as_stacks_as_packs_and_as_train_commands(capsys) -> None:
    assert main(["sweep", "--samples", "90", "--epochs", "1", "--folds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    stacked, single, commands = (row["packs"] for row in rows)
    assert stacked < single == 3 + 1 and commands == 3, "studies also refit"
    assert rows[2]["ratio"] == 1 and all(0 < row["training"] < 1 for row in rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])


@pytest.mark.slow
def test_every_requested_combination_is_a_row(capsys) -> None:
    options = ["--batches", "4", "5", "--precisions", "fp32", "bf16"]
    assert main(["step", "--shapes", "tiny", "--threads", "1", "--turns", "1", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["precision"]) for row in rows] == list(product([4, 5], ["fp32", "bf16"]))
