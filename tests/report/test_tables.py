"""Tables as text: fixed examples, and names with markup or control characters."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modis_dist.metrics import ClassPredictions, classification
from modis_dist.report.study_results import Spread
from modis_dist.report.tables import (
    ABSENT,
    class_table,
    comparison_table,
    evaluation_table,
    plain_rows,
    sweep_table,
    to_markdown,
    translation_table,
)
from modis_dist.report.terminal import show, stdout
from modis_dist.report.text import plain, settings, varying
from modis_dist.study.selection import mark

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "a|b",
    "a\\|b",
    "=cmd()",
    "\x1b[31mred\x1b[0m",
    "$x^2$",
    "[bold]x[/bold]",
    "[/]",
    "two\nlines",
    "**strong** _em_ `code`",
    "~~gone~~",
    "# heading",
    "&lt;b&gt;",
    "a\u202etxt.exe",
    "![i](http://x)",
]


def scored(*pairs: tuple[int, int]) -> ClassPredictions:
    table = np.array(pairs, np.int64)
    return ClassPredictions(table[:, 0], table[:, 1])


def example() -> dict:
    parts = {
        "mirna": scored((0, 0), (0, 0), (1, 1), (1, 0), (-1, 1)),
        "cnv": scored((0, 0), (0, 1), (1, 1)),
    }
    return classification(parts, classes=["BRCA", "OV"], absent_pairs=[("OV", "cnv")])


def example_baseline() -> dict:
    parts = {
        "mirna": scored((0, 0), (0, 0), (1, 0), (1, 0), (-1, 1)),
        "cnv": ClassPredictions(*np.zeros((2, 0), np.int64)),
    }
    result = classification(parts, classes=["BRCA", "OV"])
    fits = {
        "mirna": {"C": 0.1, "converged": False, "reason": None},
        "cnv": {"C": None, "converged": True, "reason": "no labelled training row"},
    }
    return {**result, "fits": fits, "max_iter": 1000, "converged": False}


def printed(table: Table, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def markdown(table: Table) -> tuple[str, list[str]]:
    """Return the lines of a table as Markdown, and its notes."""
    rows, *notes = to_markdown(table).removesuffix("\n").split("\n\n")
    return rows, notes


def terms(notes: list[str]) -> list[str]:
    """Return the terms that notes define: the text before the colon."""
    return [note.partition(":")[0] for note in notes]


def test_an_evaluation_is_listed_with_the_baseline():
    rows, notes = markdown(evaluation_table(example(), example_baseline()))
    assert rows == (
        "| modality | rows | balanced accuracy | macro F1 | NMI | ARI | baseline | gain |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| mirna | 4 | 0.750 | 0.733 | 0.344 | 0.000 | 0.500 | +0.250 |\n"
        "| cnv | 3 | 0.750 | 0.667 | 0.274 | -0.500 | - | - |\n"
        "| all | 7 | 0.708 | 0.708 | 0.130 | 0.028 | 0.500 | - |"
    )
    unlabelled, *_, c, mirna, cnv = notes
    assert terms(notes)[1:3] == ["baseline", "gain"]
    assert terms(notes)[4:] == ["baseline of mirna", "baseline of cnv"]
    assert "1 unlabelled" in unlabelled and "0.1" in c and "1000" in mirna
    assert cnv.endswith("no labelled training row.")


def test_an_evaluation_without_a_baseline_has_empty_columns():
    rows = plain_rows(evaluation_table(example(), None))
    assert [row[-2:] for row in rows] == [["baseline", "gain"], *[["-", "-"]] * 3]


def test_the_same_table_in_a_terminal():
    assert printed(class_table(example())) == (
        "┏━━━━━━━┳━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓\n"
        "┃ class ┃ rows ┃         all ┃       mirna ┃           cnv ┃\n"
        "┡━━━━━━━╇━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩\n"
        "│ BRCA  │    4 │ 0.750/0.750 │ 1.000/0.667 │   0.500/1.000 │\n"
        "│ OV    │    3 │ 0.667/0.667 │ 0.500/1.000 │ * 1.000/0.500 │\n"
        "└───────┴──────┴─────────────┴─────────────┴───────────────┘\n"
        "recall/precision\n"
        f"{ABSENT}"
    )


def group(condition: str, lr: float, mean: float | None, *, n: int = 5) -> dict:
    names = [f"{condition}{lr}-{k}" for k in range(5)]
    return {
        "condition": condition,
        "params": {"optim.lr": lr, "objective.beta": 1e-6},
        "mean": mean,
        "sd": None if mean is None else 0.01,
        "n": n,
        "expected": 5,
        "failed": 5 - n,
        "reasons": [],
        "baseline": None,
        "probe": None,
        "epochs": 3,
        "pruned": None,
        "trials": names,
        "done_trials": names[:n],
        "failed_trials": names[n:],
    }


def test_a_sweep_table_marks_the_best_of_each_condition_and_counts_missing_trials():
    groups = [group("base", 1e-4, 0.81), group("base", 1e-3, 0.79, n=3), group("few", 1e-4, None, n=0)]
    groups[0] |= {"baseline": 0.7, "probe": 0.4}
    rows, notes = markdown(sweep_table(mark(groups, metric="balanced_accuracy")))
    assert rows == (
        "| condition | parameters | balanced accuracy | baseline | modality probe | trials |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| base | lr=0.0001 | \\* 0.810 ± 0.010 | 0.700 | 0.400 | 5 of 5 |\n"
        "| base | lr=0.001 | 0.790 ± 0.010 | - | - | 3 of 5, 2 failed |\n"
        "| few | lr=0.0001 | - | - | - | 0 of 5, 5 failed |"
    )
    assert terms(notes)[1:4] == ["\\* best of its condition", "baseline", "modality probe"]
    assert "folds and replicates" in notes[0] and "balanced accuracy only" in notes[4]


def pruned(lr: float, mean: float, *, epoch: int) -> dict:
    return group("base", lr, mean) | {"pruned": {"epoch": epoch, "rank": 3, "of": 3}}


def test_a_pruned_configuration_names_its_rung_and_is_never_the_best():
    groups = [group("base", 1e-4, 0.81), pruned(1e-3, 0.9, epoch=20)]
    rows, notes = markdown(sweep_table(mark(groups, metric="balanced_accuracy")))
    assert "| base | lr=0.0001 | \\* 0.810 ± 0.010 | - | - | 5 of 5 |" in rows
    assert "| base | lr=0.001 | 0.900 ± 0.010 | - | - | pruned at 20 |" in rows
    assert "pruned at" in terms(notes)


def test_a_long_table_lists_the_best_in_order_and_the_number_left_out():
    rows = mark([group("base", lr, m) for lr, m in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.7))], metric="nmi")
    header, *lines = plain_rows(sweep_table(rows, max_groups=2))
    assert [line[header.index("parameters")] for line in lines] == ["lr=2", "lr=4"]
    assert "2 more; report.md" in to_markdown(sweep_table(rows, max_groups=2)).replace("\\", "")
    assert "more; report.md" not in to_markdown(sweep_table(rows, max_groups=4))


def test_a_sweep_without_groups_is_a_header():
    assert plain_rows(sweep_table([])) == [
        ["condition", "parameters", "balanced accuracy", "baseline", "modality probe", "trials"]
    ]


def compared(name: str, test: Spread, *, probe: tuple[float, float] | None, baseline: float | None) -> dict:
    probes = (
        None if probe is None else dict(zip(("logistic_regression", "knn"), probe, strict=True)) | {"perfect": 1 / 3}
    )
    return {
        "condition": name,
        "test": {"balanced_accuracy": test},
        "probe": probes and {key: {"mean": value, "sd": None, "n": 1} for key, value in probes.items()},
        "baseline": baseline and {"balanced_accuracy": {"mean": baseline, "sd": None, "n": 1}},
    }


def test_conditions_are_compared_by_balanced_accuracy_baseline_and_modality_probe():
    conditions = [
        compared("pairwise", {"mean": 0.91, "sd": 0.012, "n": 5}, probe=(0.4, 0.38), baseline=0.93),
        compared("published", {"mean": 0.9, "sd": None, "n": 1}, probe=None, baseline=None),
        compared("lost", {"mean": None, "sd": None, "n": 0}, probe=None, baseline=0.93),
    ]
    rows, notes = markdown(comparison_table(conditions))
    assert rows == (
        "| condition | balanced accuracy | n | baseline | gain | modality probe kNN | modality probe logistic |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| pairwise | 0.910 ± 0.012 | 5 | 0.930 | -0.020 | 0.380 | 0.400 |\n"
        "| published | 0.900 | 1 | - | - | - | - |\n"
        "| lost | - | 0 | 0.930 | - | - | - |"
    )
    assert terms(notes) == ["n", "baseline", "gain", "modality probe"]


def test_errors_of_translation_beside_the_all_pairs_baseline():
    mse = {"mirna": {"mirna": 0.25, "cnv": None}, "cnv": {"mirna": 1234.5, "cnv": 0.1}}
    errors = {"mse": mse, "all_pairs_baseline": {"mirna": 2.0, "cnv": None}}
    assert plain_rows(translation_table({"": errors})) == [
        ["decoded as", "from mirna", "from cnv", "all pairs"],
        ["mirna", "0.250", "1.23e+03", "2.00"],
        ["cnv", "-", "0.100", "-"],
    ]
    assert [row[0] for row in plain_rows(translation_table({"a": errors, "b": errors}))] == ["condition", *"aabb"]


# --- width --------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"[\w.]+=[^\s,│]+|[+-]?\d+\.\d+(?:e[+-]\d+)?(?:/\d+\.\d+)?")


def tokens(shown: str) -> Counter[str]:
    """Return the numbers and settings of a printed table."""
    return Counter(TOKEN.findall(shown))


def wide_sweep() -> Table:
    params = {
        "objective.beta": 1.5e-5,
        "objective.penalty_weight": 160.0,
        "model.latent": 512,
        "model.ratios": [1.2, 0.25],
    }
    other = {"objective.beta": 1e-7, "objective.penalty_weight": 10.0, "model.latent": 64, "model.ratios": [1.0, 0.5]}
    rows = [{**group(name, 1.0, 0.81), "params": p} for name in ("one_label_per_pair", "few") for p in (params, other)]
    marked = mark([row | {"baseline": 0.7, "probe": 0.987} for row in rows], metric=LONGEST)
    return sweep_table(marked, metric=LONGEST)


LONGEST = "mean_modality_balanced_accuracy"


@pytest.mark.parametrize("width", [40, 80, 100, 250])
@pytest.mark.parametrize("build", [wide_sweep, lambda: evaluation_table(example(), example_baseline())])
def test_no_number_or_setting_is_folded_or_shortened_at_any_width(width, build):
    table = build()
    expected = tokens(" ".join(cell for row in plain_rows(table) for cell in row))
    table.caption = None
    stream = io.StringIO()
    show([("", table)], Console(file=stream, width=width, color_system=None, legacy_windows=False))
    assert tokens(stream.getvalue()) == expected and "…" not in stream.getvalue()
    words = set(re.findall(r"[A-Za-z1]+", stream.getvalue()))
    assert set(" ".join(plain_rows(table)[0]).split()) <= words  # headers wrap between words only


@pytest.mark.parametrize("build", [wide_sweep, lambda: evaluation_table(example(), example_baseline())])
def test_the_tables_fit_a_terminal_of_80_columns(build):
    assert max(map(len, printed(build(), 80).splitlines())) <= 80


def test_a_pipe_gets_every_configuration_on_one_line(capsys):
    show([("Search", wide_sweep())], stdout())
    lines = [line for line in capsys.readouterr().out.splitlines() if "penalty_weight=160" in line]
    assert len(lines) == 2
    assert all("beta=1.5e-05, penalty_weight=160, latent=512, ratios=[1.2,0.25]" in line for line in lines)


# --- names --------------------------------------------------------------------------------------------------


def named(name: str) -> Table:
    result = classification({"m": scored((0, 0))}, classes=[name])
    return class_table(result)


def rendered_cells(markdown: str) -> tuple[list[str], set[str]]:
    """Return the text of the first column of the rendered HTML, and the kinds of its elements."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    inline = [part for token in tokens for part in (token.children or [])]
    kinds = {token.type for token in tokens} | {part.type for part in inline}
    firsts = ["".join(p.content for p in t.children or []) for t in tokens if t.type == "inline"]
    return firsts, kinds


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_text_in_markdown(name):
    cells, kinds = rendered_cells(to_markdown(named(name)))
    assert cells[4] == plain(name)  # after a header of four
    assert kinds <= {
        *(
            f"{tag}_{side}"
            for tag in ("table", "thead", "tbody", "tr", "th", "td", "paragraph")
            for side in ("open", "close")
        ),
        "inline",
        "text",
        "text_special",
    }


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_text_in_a_terminal(name):
    shown = printed(named(name))
    assert plain(name) in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    assert len({len(line) for line in shown.splitlines()[:5]}) == 1  # one box of one line per row


@given(st.text(max_size=80))
def test_a_plain_name_is_printable_and_short_and_unchanged_if_it_already_was(name):
    shown = plain(name)
    assert shown.isprintable() and len(shown) <= 60
    if name.isprintable() and len(name) <= 60:
        assert shown == name


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda text: text.strip() == text))
def test_any_name_survives_markdown(name):
    cells, _ = rendered_cells(to_markdown(named(name)))
    assert cells[4] == plain(name)


def test_markup_in_other_tables_is_not_shown():
    table = Table("[bold]head[/bold]")
    table.add_row("[red]x[/red]")
    table.add_row(Text("[red]y"))
    assert plain_rows(table) == [["head"], ["x"], ["[red]y"]]


def test_settings_are_named_by_their_last_part_if_it_is_unique():
    params = {"optim.lr": 1e-3, "model.modalities.a.features": 5, "model.modalities.b.features": 6, "x.y": (1, 0.5)}
    expected = "lr=0.001, model.modalities.a.features=5, model.modalities.b.features=6, y=[1,0.5]"
    assert settings(params) == expected
    assert settings(params, ["optim.lr", "absent"]) == "lr=0.001"


def test_only_varying_settings_count_as_varying():
    params = [{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]
    assert varying(params) == ["b", "c"]
