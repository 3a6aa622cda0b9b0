"""Parameter counts equal table S2 of the paper."""

import pytest
import torch

from modis_dist.model.layers import count_parameters
from modis_dist.model.networks import Modis, Shape, widths

INTERSIM_RATIOS = (1.2, 1.0, 0.75, 0.5, 0.25)
INTERSIM = {"methylation": (367, INTERSIM_RATIOS), "rna": (131, INTERSIM_RATIOS), "protein": (160, INTERSIM_RATIOS)}
TCGA10 = {
    "methylation": (2500, (1.2, 0.8, 0.6, 0.4, 0.2)),
    "rna": (2500, (1.2, 0.8, 0.6, 0.5)),
    "mirna": (542, (1.2, 1.0)),
}


def built(nets: dict[str, tuple[int, tuple[float, ...]]], *, latent: int, classes: int, slots: int) -> Modis:
    shape = Shape(
        {m: p for m, (p, _) in nets.items()}, {m: widths(p, ratios) for m, (p, ratios) in nets.items()}, latent, classes
    )
    with torch.device("meta"):
        return Modis(shape, slots=slots)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    ("nets", "latent", "classes", "vaes", "discriminator", "total"),
    [
        (INTERSIM, 64, 5, [1_007_647, 134_081, 198_320], 724_744, 2_064_792),
        (TCGA10, 512, 10, [37_818_524, 38_717_524, 2_249_346], 1_184_781, 79_970_175),
    ],
    ids=["intersim", "tcga10"],
)
def test_parameter_counts_equal_table_s2(nets, latent, classes, vaes, discriminator, total, slots) -> None:
    model = built(nets, latent=latent, classes=classes, slots=slots)
    assert [count_parameters(model.vae(m)) for m in nets] == vaes
    assert count_parameters(model.discriminator) == discriminator
    assert count_parameters(model) == total
