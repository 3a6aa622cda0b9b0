"""The figures of one finished training."""

from modis_dist.evaluate.evaluation import latent_means
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.results import Result, read_history
from modis_dist.train.stack import Member


def draw(member: Member, result: Result) -> None:
    """Write loss curves, latent PCA, confusion matrices and MSE heat map to ``figures/`` of the training."""
    evaluation = result["evaluation"]
    if evaluation is None:
        return
    from modis_dist.report import drawing, figures  # imports matplotlib, which workers of a search do not need

    classes, subset = member.prepared.classes, getattr(member.prepared, result["evaluated_on"])
    mu = latent_means(Predictor.open(member.folder), subset)
    folder = member.folder / "figures"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, figure in {
        "loss_curves": figures.loss_curves(read_history(member.folder), best_epoch=result["best_epoch"]),
        "latent_pca": figures.latent_pca(mu, subset.label, classes),
        "confusion": figures.confusion(evaluation["classification"], classes),
        "mse_heatmap": figures.mse_heatmap(evaluation["translation"]),
    }.items():
        drawing.save(figure, folder / f"{name}.png")
