"""The figures of one finished training."""

from pathlib import Path

from modis_dist.evaluate.evaluation import latent_means
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.results import Result, read_history
from modis_dist.train.stack import Member

FIGURES = ("loss_curves", "latent_pca", "confusion", "mse_heatmap")


def draw(member: Member, result: Result) -> list[Path]:
    """Draw loss curves, latent PCA, confusion matrices and MSE heat map into ``figures/``; return the files."""
    if result["evaluation"] is None:
        return []
    from modis_dist.report import figures  # imports matplotlib, which workers of a search do not need

    folder = member.folder / "figures"
    folder.mkdir(mode=0o700, exist_ok=True)
    classes = member.prepared.classes
    subset = getattr(member.prepared, result["evaluated_on"])
    mu = latent_means(Predictor.open(member.folder), subset)
    paths = [folder / f"{name}.png" for name in FIGURES]
    figures.loss_curves(read_history(member.folder), paths[0], best_epoch=result["best_epoch"])
    figures.latent_pca(mu, subset.label, classes, paths[1])
    figures.confusion(result["evaluation"]["classification"], classes, paths[2])
    figures.mse_heatmap(result["evaluation"]["translation"], paths[3])
    return paths
