"""Every key of a ``run.yaml``: the typed configuration of one training.

Every key has a description, a default and, where they apply, a unit and a range; ``modis-dist config --explain KEY``
prints them. A rule that spans several keys is a ``model_validator`` of the section they share.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"

Name = Annotated[str, Field(pattern=NAME)]
Label = Annotated[str, Field(min_length=1, max_length=200)]
Folder = Annotated[str, Field(min_length=1, max_length=4096)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def item(default: Any, description: str, *, unit: str | None = None, **limits: Any) -> Any:
    """Return a documented pydantic field; ``default=...`` makes the key required."""
    extra: JsonDict | None = {"unit": unit} if unit else None
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Base class of configuration sections: frozen, with finite numbers only; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _no_silent_casts(cls, value: Any) -> Any:
        """Convert booleans to text, which number fields reject; pydantic would read ``true`` as the number 1."""
        if not isinstance(value, dict):
            return value
        converted = {
            key: _bools_as_text(given)
            for key, given in value.items()
            if key in cls.model_fields and not _mentions(cls.model_fields[key].annotation, (bool, str, Any))
        }
        return value | converted


def _bools_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_bools_as_text(element) for element in value]
    return str(value).lower() if isinstance(value, bool) else value


def _mentions(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    return annotation in kinds or any(_mentions(argument, kinds) for argument in get_args(annotation))


# --- data ---------------------------------------------------------------------------------------------------


class Simulate(Section):
    """A data set simulated with the InterSIM algorithm."""

    kind: Literal["intersim"] = item("intersim", "simulation algorithm")
    samples: int = item(
        500, "number of samples, each with a row in every modality", unit="samples", ge=10, le=10_000_000
    )
    classes: int = item(5, "number of classes, of equal size", ge=2, le=1000)
    delta: float = item(2.0, "mean shift of a differential feature (methylation: on the logit scale)", ge=0, le=100)
    seed: int = item(1234, "seed of the simulation", ge=0, lt=2**63)
    reference: Folder | None = item(
        None, "folder of the R package's reference tables (Parquet); default: generated ones"
    )


class Split(Section):
    """The split into training, validation and test rows; a group (patient) is never divided."""

    test: Literal["stored", "stratified", "none"] = item(
        "stratified",
        "test rows: stored (the store's `split` column), stratified (drawn per class and modality) or none",
    )
    test_fraction: float = item(0.2, "fraction of groups drawn for the test set", gt=0, lt=1)
    validation_fraction: float = item(0.15, "fraction of training groups held out for validation; 0: none", ge=0, lt=1)
    folds: int | None = item(None, "number of cross-validation folds; overrides validation_fraction", ge=2, le=100)
    fold: int | None = item(None, "index of the validation fold, from 0", ge=0)
    seed: int = item(0, "seed of the split; replicates share it, and so their test rows", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fold_of_folds(self) -> "Split":
        if (self.folds is None) != (self.fold is None):
            raise ValueError("folds and fold must be given together")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold must be below folds ({self.folds}); got {self.fold}")
        return self


class Data(Section):
    """The data set and its split."""

    store: Folder | None = item(None, "store folder written by `modis-dist data import`, relative to the YAML file")
    simulate: Simulate | None = item(None, "simulate a data set instead of reading a store")
    modalities: tuple[Name, ...] | None = item(
        None, "modalities to use, in this order; default: all of the store", min_length=2
    )
    classes: tuple[Label, ...] | None = item(
        None, "classes to use; rows of other classes are excluded; default: all of the store", min_length=2
    )
    split: Split = item(Split(), "training, validation and test rows")

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if self.store is not None and self.simulate is not None:
            raise ValueError("set store or simulate, not both")
        return self


# --- preprocessing ------------------------------------------------------------------------------------------


class Standardise(Section):
    kind: Literal["standardise"] = item(
        "standardise", "scale each feature to mean 0 and variance 1, fitted on training rows"
    )


class MinMax(Section):
    kind: Literal["minmax"] = item("minmax", "scale each feature to 0..1, fitted on training rows")


class Log1p(Section):
    kind: Literal["log1p"] = item("log1p", "log(1 + x); negative values are an error")


class Impute(Section):
    kind: Literal["impute"] = item("impute", "replace missing values, fitted on training rows")
    strategy: Literal["mean", "median"] = item("mean", "replacement for a missing value, per feature")


class VarianceFilter(Section):
    kind: Literal["variance_filter"] = item("variance_filter", "keep the features of highest variance in training rows")
    features: int = item(..., "number of features to keep", unit="features", ge=1)


class Pca(Section):
    kind: Literal["pca"] = item("pca", "project onto principal components, fitted on training rows")
    components: int = item(..., "number of components", unit="components", ge=1)
    solver: Literal["auto", "randomized", "incremental"] = item(
        "auto", "scikit-learn solver; auto: full, or incremental for large data"
    )
    seed: int = item(0, "seed of the randomized solver", ge=0, lt=2**31)


def kind_only(value: Any) -> Any:
    """Expand ``standardise`` to ``{kind: standardise}``."""
    return {"kind": value} if isinstance(value, str) else value


_Preprocess = Annotated[Standardise | MinMax | Log1p | Impute | VarianceFilter | Pca, Field(discriminator="kind")]
PreprocessStep = Annotated[
    _Preprocess,
    BeforeValidator(
        kind_only, json_schema_input_type=_Preprocess | Literal["standardise", "minmax", "log1p", "impute"]
    ),
]


def _none_is_no_step(value: Any) -> Any:
    """Return an empty list for ``none`` or ``[none]``."""
    if value == "none" or (isinstance(value, list | tuple) and list(value) == ["none"]):
        return []
    if isinstance(value, list | tuple) and "none" in list(value):
        raise ValueError("`none` cannot be combined with other steps")
    return value


_Steps = tuple[PreprocessStep, ...]
Steps = Annotated[_Steps, BeforeValidator(_none_is_no_step, json_schema_input_type=_Steps | Literal["none"])]


class Preprocess(Section):
    """Preprocessing steps per modality, fitted on training rows only and saved with the model."""

    default: Steps = item((Standardise(),), "steps, in order, of modalities not listed in `modalities`; none: no steps")
    modalities: dict[Name, Steps] = item({}, "steps, in order, per modality name; none: no steps")

    def steps(self, modality: str) -> tuple[PreprocessStep, ...]:
        """Return the steps of one modality."""
        return self.modalities.get(modality, self.default)


# --- scenario -----------------------------------------------------------------------------------------------


class Pair(Section):
    """One class in one modality."""

    label: Label = item(..., "class name")
    modality: Name = item(..., "modality name")


class HideLabels(Section):
    kind: Literal["hide_labels"] = item("hide_labels", "hide labels of training rows; set fraction or keep")
    fraction: Fraction | None = item(None, "fraction of labels to hide, per class and modality")
    keep: int | None = item(None, "labels to keep, per class and modality", unit="rows", ge=0)
    classes: tuple[Label, ...] | None = item(None, "apply to these classes only")
    modalities: tuple[Name, ...] | None = item(None, "apply to these modalities only")
    seed: int | None = item(None, "seed of the row selection; default: the run's seed", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_amount(self) -> "HideLabels":
        if (self.fraction is None) == (self.keep is None):
            raise ValueError("set exactly one of fraction and keep")
        return self


class CutClass(Section):
    kind: Literal["cut_class"] = item("cut_class", "reduce one class to a number of training rows in every modality")
    label: Label = item(..., "class name")
    rows: int = item(..., "rows to keep in each modality", unit="rows", ge=0)
    seed: int | None = item(None, "seed of the row selection; default: the run's seed", ge=0, lt=2**63)


class DropPairs(Section):
    kind: Literal["drop_pairs"] = item("drop_pairs", "remove all training rows of the listed (class, modality) pairs")
    pairs: tuple[Pair, ...] = item(..., "(class, modality) pairs", min_length=1)


class KeepPairs(Section):
    kind: Literal["keep_pairs"] = item("keep_pairs", "reduce each (class, modality) pair to a number of training rows")
    pairs: tuple[Pair, ...] = item(..., "(class, modality) pairs", min_length=1)
    rows: int = item(..., "rows to keep of each pair", unit="rows", ge=0)
    seed: int | None = item(None, "seed of the row selection; default: the run's seed", ge=0, lt=2**63)


class Unpair(Section):
    kind: Literal["unpair"] = item("unpair", "keep one modality per sample, in equal numbers within each class")
    seed: int | None = item(None, "seed of the row selection; default: the run's seed", ge=0, lt=2**63)


class Subsample(Section):
    kind: Literal["subsample"] = item("subsample", "keep a subset of the training rows; set fraction or rows")
    fraction: Fraction | None = item(None, "fraction of rows to keep, per class and modality")
    rows: int | None = item(None, "number of rows to keep, per class and modality", unit="rows", ge=1)
    modalities: tuple[Name, ...] | None = item(None, "apply to these modalities only")
    seed: int | None = item(None, "seed of the row selection; default: the run's seed", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_amount(self) -> "Subsample":
        if (self.fraction is None) == (self.rows is None):
            raise ValueError("set exactly one of fraction and rows")
        return self


_Scenario = Annotated[HideLabels | CutClass | DropPairs | KeepPairs | Unpair | Subsample, Field(discriminator="kind")]
ScenarioStep = Annotated[_Scenario, BeforeValidator(kind_only, json_schema_input_type=_Scenario | Literal["unpair"])]

# --- model and objective ------------------------------------------------------------------------------------


Likelihood = Literal["gaussian", "bernoulli", "poisson", "negative_binomial"]
COUNTS = frozenset({"poisson", "negative_binomial"})
AdversarialLoss = Literal["published", "pairwise", "class_conditional", "cross_entropy"]


class ModalityNet(Section):
    """The VAE of one modality."""

    features: int | None = item(
        None, "expected features after preprocessing; default: not checked", unit="features", ge=1
    )
    ratios: tuple[Annotated[float, Field(gt=0, le=10)], ...] | None = item(
        None, "hidden layer widths as multiples of the features; default: model.ratios", min_length=1
    )
    likelihood: Likelihood = item(
        "gaussian",
        "likelihood of the decoder: gaussian (unit variance, that is squared error; paper), bernoulli (values in "
        "0..1), poisson or negative_binomial (counts; the library size is the sum of a row; negative_binomial learns "
        "one dispersion per feature)",
    )


class Model(Section):
    """Layer sizes (paper, figure S1 and table S2)."""

    latent: int = item(64, "latent dimensions (paper: L)", ge=1, le=65536)
    ratios: tuple[Annotated[float, Field(gt=0, le=10)], ...] = item(
        (1.2, 1.0, 0.75, 0.5, 0.25),
        "hidden layer widths of the encoders as multiples of the features; decoders: reversed",
        min_length=1,
    )
    modalities: dict[Name, ModalityNet] = item({}, "settings per modality name")
    classes: int | None = item(None, "expected number of classes (paper: K); default: not checked", ge=2)
    discriminator: tuple[Annotated[int, Field(ge=1)], ...] = item(
        (1024, 512, 256), "hidden layer widths of the discriminator", min_length=1
    )
    batchnorm_eps: float = item(0.8, "`eps` of every BatchNorm1d; 0.8 (paper)", gt=0, le=10)
    leaky_slope: float = item(0.2, "`negative_slope` of every LeakyReLU", ge=0, lt=1)


class Objective(Section):
    """Losses and their weights (paper, equations 1 and 2 and supplement A.2)."""

    beta: float = item(1e-4, "weight of the KL divergence", ge=0, le=1e6)
    kl_reduction: Literal["sum", "mean"] = item(
        "sum",
        "reduction of the KL divergence over the rows of a batch; sum (paper): scale `beta` with the batch size",
    )
    adversarial_loss: AdversarialLoss = item(
        "pairwise",
        "loss of the modality discriminator and the encoders. pairwise: relativistic pairs (R3GAN); class_conditional: "
        "pairs within a class; cross_entropy: modality classification; published (paper): without encoder gradient",
    )
    adversarial_weight: float = item(1.0, "weight of the adversarial loss in both phases", ge=0, le=1e6)
    pseudo_label_threshold: float = item(
        0.9, "class_conditional: minimum probability at which an unlabelled row gets its predicted class", gt=0, le=1
    )
    penalty_weight: float = item(10.0, "weight of the gradient penalty (paper: gamma, lambda_r); 0: off", ge=0, le=1e6)
    penalty_outputs: Literal["sum", "each"] = item(
        "sum", "outputs whose gradient is penalised: the sum of the modality logits (paper) or each logit"
    )
    penalty_inputs: Literal["x", "z"] = item(
        "x", "inputs of the penalised gradient: the features x, through the frozen encoder (paper), or the latents z"
    )
    classification_weight: float = item(1.0, "weight of the class cross-entropy", ge=0, le=1e6)
    clustering_weight: float = item(1.0, "weight of the clustering loss", ge=0, le=1e6)
    class_prior: Literal["uniform", "empirical"] = item(
        "uniform",
        "class frequencies expected by the entropy term of the clustering loss: equal (paper) or those of the labelled "
        "training rows",
    )


# ``published``: table S3 of the paper. ``fast`` classifies better with a fifteenth of the steps; it was selected on
# validation rows among learning rates from 1e-3 to 4e-3 (which diverges), batches of 32 and 64 rows, and 20 to 40
# epochs (``python -m tools.bench quality``).
PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "optim.lr": 1e-4,
        "optim.lr_schedule": "constant",
        "optim.batch_size": 32,
        "optim.epochs": 300,
        "trainer.early_stopping": None,
    },
    "fast": {
        "optim.lr": 1e-3,
        "optim.lr_schedule": "cosine",
        "optim.batch_size": 64,
        "optim.epochs": 40,
        "trainer.early_stopping": {"patience": 10},
    },
}


def _preset_text(preset: str) -> str:
    settings = PRESETS[preset].items()
    return ", ".join(f"{key} {'null' if value is None else str(value).strip('{}')}" for key, value in settings).replace(
        "'", ""
    )


class Optim(Section):
    """Optimisers, learning rates and batches."""

    preset: Literal["published", "fast"] = item(
        "published",
        f"sets several keys. published (paper): {_preset_text('published')}; fast: {_preset_text('fast')}. In a file, "
        "explicit keys override the preset; in --set, sweep.conditions and sweep.grid the preset overrides the keys",
    )
    lr: float = item(1e-4, "learning rate of the VAEs; 1e-4 (paper)", gt=0, le=10)
    lr_discriminator: float | None = item(None, "learning rate of the discriminator; default: lr", gt=0, le=10)
    lr_schedule: Literal["constant", "cosine"] = item(
        "constant", "learning rate schedule: constant (paper) or cosine annealing to 0 over all epochs"
    )
    beta1: float = item(0.5, "Adam beta1; 0.5 (paper)", ge=0, lt=1)
    beta2: float = item(0.999, "Adam beta2", ge=0, lt=1)
    batch_size: int = item(
        32, "global batch size: rows per modality over all workers; 32 (paper)", unit="rows", ge=2, le=1_000_000
    )
    epochs: int = item(300, "maximum number of epochs; 300 for InterSIM (paper)", unit="epochs", ge=1, le=10_000_000)
    epoch_length: Literal["shortest", "longest"] = item(
        "shortest",
        "end of an epoch: when the shortest modality is exhausted (paper), or the longest, while the others repeat",
    )
    min_labelled_fraction: float = item(
        0.25,
        "minimum fraction of labelled rows per batch; labelled rows are oversampled to reach it; 0 disables (paper)",
        ge=0,
        lt=1,
    )


class EarlyStopping(Section):
    """Stop a training whose validation metric no longer improves."""

    patience: int = item(10, "validations without improvement before stopping", unit="validations", ge=1)
    min_delta: float = item(0.0, "minimum change that counts as an improvement", ge=0)


Metric = Literal["balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari", "reconstruction_mse"]


class Trainer(Section):
    """Device, precision, validation and checkpoints of a training."""

    device: str = item("auto", "auto, cpu, cuda or cuda:N; auto: a GPU if there is one", pattern=DEVICE)
    threads: int | None = item(
        None, "CPU threads; default: all cores, or the cores of the pack in a sweep", unit="threads", ge=1, le=4096
    )
    workers: int = item(
        1,
        "Ray Train workers that share one training, each with a part of every batch; the number of workers does not "
        "change the optimisation",
        ge=1,
        le=4096,
    )
    feature_storage: Literal["auto", "memory", "disk"] = item(
        "auto",
        "storage of preprocessed features during training: memory, or disk (memory-mapped temporary files in TMPDIR); "
        "auto: disk if they do not fit in memory. Results are identical",
    )
    precision: Literal["fp32", "bf16", "fp16"] = item(
        "fp32",
        "autocast precision; fp16 needs a GPU and scales the losses. Losses, and the networks inside "
        "the gradient penalty, stay in fp32",
    )
    validate_every: int = item(1, "epochs between validations", unit="epochs", ge=1)
    metric: Metric = item(
        "balanced_accuracy",
        "validation metric that selects the best epoch; ties are broken by the reconstruction error",
    )
    early_stopping: EarlyStopping | None = item(None, "early stopping; default: off")
    log_every: int = item(10, "steps between reads of the losses from the device", unit="steps", ge=1)
    checkpoint_every: int = item(10, "epochs between checkpoints", unit="epochs", ge=1)


class Run(Section):
    """The configuration of one training."""

    name: Name = item("run", "name of the run or study")
    data: Data = item(Data(), "data set and split")
    preprocess: Preprocess = item(Preprocess(), "preprocessing steps per modality")
    scenario: tuple[ScenarioStep, ...] = item((), "changes to the training rows, applied in order")
    model: Model = item(Model(), "layer sizes")
    objective: Objective = item(Objective(), "losses and their weights")
    optim: Optim = item(Optim(), "optimisers, learning rates and batches")
    trainer: Trainer = item(Trainer(), "device, precision, validation and checkpoints")
    seed: int = item(0, "seed of the initial weights, row order, noise and scenario", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _preprocessing_fits_likelihood(self) -> "Run":
        for modality, net in self.model.modalities.items():
            kinds = [step.kind for step in self.preprocess.steps(modality)]
            if net.likelihood in COUNTS:
                allowed = "[log1p], with variance_filter before or after it"
                valid = set(kinds) - {"variance_filter"} == {"log1p"}
            else:
                allowed, valid = "none, [impute] or [variance_filter]", set(kinds) <= {"impute", "variance_filter"}
            if net.likelihood != "gaussian" and not valid:
                raise ValueError(
                    f"model.modalities.{modality}.likelihood {net.likelihood} needs preprocess.modalities.{modality}: "
                    f"{allowed}; got {', '.join(kinds) or 'none'}"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, tree: Any) -> Any:
        """Fill in the keys of the preset that the tree does not set."""
        optim = tree.get("optim") if isinstance(tree, dict) else None
        if not isinstance(optim, dict) or optim.get("preset") != "fast":
            return tree
        filled = dict(tree)
        for key, default in PRESETS["fast"].items():
            section, name = key.split(".")
            stated = filled.get(section, {})
            if isinstance(stated, dict):
                value = stated.get(name, default)
                if isinstance(value, dict) and isinstance(default, dict):
                    value = {**default, **value}
                filled[section] = stated | {name: value}
        return filled
