"""`modis-dist config` and `modis-dist model`: configuration keys, and parameter counts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modis_dist.cli.options import Json, Set, StudyFile, print_json
from modis_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from modis_dist.config.study import Study


def config(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY.yaml]", show_default=False, help="Study to check and print with all defaults."),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a study.")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="KEY", help="Explain a key, e.g. optim.lr or cluster.time.")
    ] = None,
    settings: Set = None,
) -> None:
    """Explain a configuration key, print the JSON Schema, or check a study and print it with all defaults.

    Example: `modis-dist config --explain optim.lr`
    """
    from modis_dist.config import cluster, keys, parse
    from modis_dist.config.study import Study

    if [study is not None, schema, explain is not None].count(True) != 1:
        raise UserError("config: expected exactly one of STUDY.yaml, --schema and --explain KEY")
    if schema:
        print_json(Study.model_json_schema())
    elif explain is not None:
        typer.echo(keys.explain(explain, cluster.Explained if explain.split(".")[0] == "cluster" else Study))
    elif study is not None:
        from modis_dist.study.manifest import expand

        loaded = parse.load_study(study, settings or [])
        expand(loaded, "", source=str(study))  # finds mistakes in combinations of the grid, without the data
        typer.echo(parse.dump(loaded), nl=False)


def model(
    study: StudyFile,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Count the parameters of each network. Reads the data only if the study does not state all sizes.

    Example: `modis-dist model tune_spaces/intersim.yaml`
    """
    from modis_dist.config.parse import load_study

    counts = _parameters(load_study(study, settings or []), source=str(study))
    if as_json:
        print_json(counts)
        return
    from modis_dist.report.tables import add, empty, finished, numbers
    from modis_dist.report.terminal import show, stdout

    table = empty("module")
    numbers(table, "parameters")
    for name, number in counts["modules"].items():
        add(table, name, f"{number:,}")
    add(table, "total", f"{counts['total']:,}", style="bold")
    show([("", finished(table))], stdout())


def _parameters(study: "Study", *, source: str) -> dict[str, Any]:
    import tempfile

    import torch

    from modis_dist.data.open_store import open_store
    from modis_dist.model.layers import count_parameters
    from modis_dist.model.networks import Modis
    from modis_dist.train.placement import storage_of
    from modis_dist.train.prepare import load_cohort, prepare, shape, stated_shape

    sizes = stated_shape(study)
    if sizes is None:
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(study.data, out=Path(folder), source=source)
            cohort = load_cohort(store, study.data, storage=storage_of(study, store))
            prepared = prepare(study.base(), cohort)
        features = {m: len(pipeline.features_out) for m, pipeline in prepared.pipelines.items()}
        sizes = shape(study, features, len(prepared.classes))
    with torch.device("meta"):
        networks = Modis(sizes)
    modules = {m: count_parameters(networks.vae(m)) for m in networks.modalities}
    modules["discriminator"] = count_parameters(networks.discriminator)
    return {"modules": modules, "total": sum(modules.values())}
