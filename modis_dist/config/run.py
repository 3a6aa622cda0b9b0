"""The typed tree that describes one training: what a ``run.yaml`` may hold.

Every key has a description, a unit where it has one, a default and a range; ``modis-dist config --explain KEY``
prints them. Rules that span several keys stand in the ``model_validator`` of the section they share.
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
    """A documented key; ``default=...`` makes it required."""
    extra: JsonDict | None = {"unit": unit} if unit else None
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A group of keys: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _no_silent_casts(cls, value: Any) -> Any:
        """Keep pydantic from reading ``true`` as the number 1: as text it is refused with the other mistakes."""
        if not isinstance(value, dict):
            return value
        told = {
            key: _bools_as_text(held)
            for key, held in value.items()
            if key in cls.model_fields and not _mentions(cls.model_fields[key].annotation, (bool, str, Any))
        }
        return value | told


def _bools_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_bools_as_text(held) for held in value]
    return str(value).lower() if isinstance(value, bool) else value


def _mentions(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    return annotation in kinds or any(_mentions(argument, kinds) for argument in get_args(annotation))


# --- data ---------------------------------------------------------------------------------------------------


class Simulate(Section):
    """A data set simulated on the fly with the InterSIM algorithm."""

    kind: Literal["intersim"] = item("intersim", "simulator")
    samples: int = item(500, "samples, each with a row in all three modalities", unit="samples", ge=10, le=10_000_000)
    classes: int = item(5, "balanced classes", ge=2, le=1000)
    delta: float = item(2.0, "mean shift of a differential feature (logit scale for methylation)", ge=0, le=100)
    seed: int = item(1234, "seed of the simulation", ge=0, lt=2**63)
    params: Folder | None = item(None, "folder of the original tables as Parquet; without it tables are generated")


class Split(Section):
    """Which rows are test, validation and training rows; groups (patients) are never cut."""

    test: Literal["stored", "stratified", "none"] = item(
        "stratified", "test rows: the store's `split` column, a stratified draw by class within each modality, or none"
    )
    test_fraction: float = item(0.2, "share of groups drawn for test", gt=0, lt=1)
    validation_fraction: float = item(0.15, "share of training groups held out for validation; 0 for none", ge=0, lt=1)
    folds: int | None = item(None, "number of cross-validation folds; replaces validation_fraction", ge=2, le=100)
    fold: int | None = item(None, "which fold is the validation set, from 0", ge=0)
    seed: int = item(0, "seed of the split; the same for all replicates so that they share test rows", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fold_of_folds(self) -> "Split":
        if (self.folds is None) != (self.fold is None):
            raise ValueError("folds and fold must be given together")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold must be below folds ({self.folds}); got {self.fold}")
        return self


class Data(Section):
    """Where the rows come from."""

    store: Folder | None = item(None, "folder of a store made by `modis-dist data import`; relative to the YAML file")
    simulate: Simulate | None = item(None, "simulate a store instead of naming one")
    modalities: tuple[Name, ...] | None = item(
        None, "subset and order of the store's modalities; all by default", min_length=2
    )
    classes: tuple[Label, ...] | None = item(
        None, "subset of the store's classes; rows of others are left out", min_length=2
    )
    split: Split = item(Split(), "test, validation and training rows")

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if self.store is not None and self.simulate is not None:
            raise ValueError("give store or simulate, not both")
        return self


# --- preprocessing ------------------------------------------------------------------------------------------


class Standardise(Section):
    kind: Literal["standardise"] = item("standardise", "mean 0, standard deviation 1 per feature, from training rows")


class MinMax(Section):
    kind: Literal["minmax"] = item("minmax", "scale each feature to 0..1 by the range of the training rows")


class Log1p(Section):
    kind: Literal["log1p"] = item("log1p", "log(1 + x); values below 0 are refused")


class Impute(Section):
    kind: Literal["impute"] = item("impute", "fill missing values from the training rows")
    value: Literal["mean", "median"] = item("mean", "what a missing value becomes")


class Variance(Section):
    kind: Literal["variance"] = item("variance", "keep the features that vary most over the training rows")
    features: int = item(..., "number of features to keep", unit="features", ge=1)


class Pca(Section):
    kind: Literal["pca"] = item("pca", "principal components of the training rows (scikit-learn)")
    components: int = item(..., "number of components", unit="components", ge=1)
    solver: Literal["auto", "randomized", "incremental"] = item(
        "auto", "how they are computed; auto: incremental where large"
    )
    seed: int = item(0, "seed of the randomised solver", ge=0, lt=2**31)


def kind_only(value: Any) -> Any:
    """`standardise` is short for `kind: standardise`."""
    return {"kind": value} if isinstance(value, str) else value


_Preprocess = Annotated[Standardise | MinMax | Log1p | Impute | Variance | Pca, Field(discriminator="kind")]
PreprocessStep = Annotated[
    _Preprocess,
    BeforeValidator(
        kind_only, json_schema_input_type=_Preprocess | Literal["standardise", "minmax", "log1p", "impute"]
    ),
]


def _none_is_no_step(value: Any) -> Any:
    """`none`, or `[none]`, is an empty list of steps."""
    if value == "none" or (isinstance(value, list | tuple) and list(value) == ["none"]):
        return []
    if isinstance(value, list | tuple) and "none" in list(value):
        raise ValueError("`none` stands alone, without other steps")
    return value


_Steps = tuple[PreprocessStep, ...]
Steps = Annotated[_Steps, BeforeValidator(_none_is_no_step, json_schema_input_type=_Steps | Literal["none"])]


class Preprocess(Section):
    """Ordered steps per modality; what they learn is learnt from training rows only and stored with the run."""

    default: Steps = item((Standardise(),), "steps of every modality without its own list; none for no step")
    modalities: dict[Name, Steps] = item({}, "steps of single modalities, by name; none for no step")

    def steps(self, modality: str) -> tuple[PreprocessStep, ...]:
        """The steps of one modality."""
        return self.modalities.get(modality, self.default)


# --- scenario -----------------------------------------------------------------------------------------------


class Pair(Section):
    """One class in one modality."""

    label: Label = item(..., "class")
    modality: Name = item(..., "modality")


class HideLabels(Section):
    kind: Literal["hide_labels"] = item("hide_labels", "make labelled training rows unlabelled; give fraction or keep")
    fraction: Fraction | None = item(None, "share of the labels to hide, per class and modality")
    keep: int | None = item(None, "labels to keep, per class and modality", unit="rows", ge=0)
    classes: tuple[Label, ...] | None = item(None, "only these classes")
    modalities: tuple[Name, ...] | None = item(None, "only these modalities")
    seed: int | None = item(None, "seed of the choice; the run's seed by default", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_amount(self) -> "HideLabels":
        if (self.fraction is None) == (self.keep is None):
            raise ValueError("give exactly one of fraction and keep")
        return self


class CutClass(Section):
    kind: Literal["cut_class"] = item("cut_class", "keep n training rows of a class in every modality")
    label: Label = item(..., "class")
    rows: int = item(..., "rows to keep per modality", unit="rows", ge=0)
    seed: int | None = item(None, "seed of the choice; the run's seed by default", ge=0, lt=2**63)


class DropPairs(Section):
    kind: Literal["drop_pairs"] = item("drop_pairs", "remove all training rows of class/modality pairs")
    pairs: tuple[Pair, ...] = item(..., "the pairs", min_length=1)


class KeepPairs(Section):
    kind: Literal["keep_pairs"] = item("keep_pairs", "keep n training rows of class/modality pairs")
    pairs: tuple[Pair, ...] = item(..., "the pairs", min_length=1)
    rows: int = item(..., "rows to keep of each pair", unit="rows", ge=0)
    seed: int | None = item(None, "seed of the choice; the run's seed by default", ge=0, lt=2**63)


class Unpair(Section):
    kind: Literal["unpair"] = item("unpair", "each sample keeps one modality, shares equal within every class")
    seed: int | None = item(None, "seed of the choice; the run's seed by default", ge=0, lt=2**63)


class Subsample(Section):
    kind: Literal["subsample"] = item("subsample", "keep part of the training rows; give fraction or rows")
    fraction: Fraction | None = item(None, "share to keep, per class and modality")
    rows: int | None = item(None, "rows to keep, per class and modality", unit="rows", ge=1)
    modalities: tuple[Name, ...] | None = item(None, "only these modalities")
    seed: int | None = item(None, "seed of the choice; the run's seed by default", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_amount(self) -> "Subsample":
        if (self.fraction is None) == (self.rows is None):
            raise ValueError("give exactly one of fraction and rows")
        return self


_Scenario = Annotated[HideLabels | CutClass | DropPairs | KeepPairs | Unpair | Subsample, Field(discriminator="kind")]
ScenarioStep = Annotated[_Scenario, BeforeValidator(kind_only, json_schema_input_type=_Scenario | Literal["unpair"])]

# --- model and objective ------------------------------------------------------------------------------------


Likelihood = Literal["gaussian", "bernoulli", "poisson", "negative_binomial"]
COUNTS = frozenset({"poisson", "negative_binomial"})


class ModalityNet(Section):
    """The VAE of one modality."""

    features: int | None = item(None, "features after preprocessing; checked against the data", unit="features", ge=1)
    ratios: tuple[Annotated[float, Field(gt=0, le=10)], ...] | None = item(
        None, "hidden widths as shares of the features", min_length=1
    )
    likelihood: Likelihood = item(
        "gaussian",
        "what the decoder models: gaussian (unit variance, that is squared error; published), bernoulli (values in "
        "0..1), poisson or negative_binomial (counts; the total of a row is its library size; the latter learns a "
        "dispersion for each feature)",
    )


class Model(Section):
    """Layer sizes (paper, figure S1 and table S2)."""

    latent: int = item(64, "latent dimensions L", ge=1, le=65536)
    ratios: tuple[Annotated[float, Field(gt=0, le=10)], ...] = item(
        (1.2, 1.0, 0.75, 0.5, 0.25), "hidden widths of the encoders as shares of the features", min_length=1
    )
    modalities: dict[Name, ModalityNet] = item({}, "settings of single modalities, by name")
    classes: int | None = item(None, "number of classes K; checked against the data", ge=2)
    discriminator: tuple[Annotated[int, Field(ge=1)], ...] = item(
        (1024, 512, 256), "hidden widths of the discriminator", min_length=1
    )
    batchnorm_eps: float = item(0.8, "eps of every BatchNorm1d; the published value", gt=0, le=10)
    leaky_slope: float = item(0.2, "negative slope of every LeakyReLU", ge=0, lt=1)


class Objective(Section):
    """Which losses, with which weights (paper, equations 1 and 2 and supplement A.2)."""

    beta: float = item(1e-4, "weight of the KL divergence", ge=0, le=1e6)
    kl_reduction: Literal["sum", "mean"] = item(
        "sum", "KL summed over the rows of the batch (published code; beta then belongs to the batch size) or averaged"
    )
    adversarial_loss: Literal["published", "pairwise", "class_conditional", "cross_entropy"] = item(
        "pairwise", "modality adversary; `published` has no encoder gradient and is kept to reproduce the paper"
    )
    adversarial_weight: float = item(1.0, "weight of the adversarial term in both phases", ge=0, le=1e6)
    confidence: float = item(
        0.9, "class_conditional: predicted probability from which an unlabelled row counts as of that class", gt=0, le=1
    )
    lambda_r: float = item(10.0, "weight gamma of the gradient penalty", ge=0, le=1e6)
    penalty: Literal["sum", "each"] = item(
        "sum", "gradient of the sum of the modality logits (published) or of each logit"
    )
    penalty_on: Literal["x", "z"] = item(
        "x", "gradient with respect to the input through the frozen encoder (published) or to z"
    )
    class_weight: float = item(1.0, "weight of the class cross-entropy", ge=0, le=1e6)
    clustering_weight: float = item(1.0, "weight of the clustering loss", ge=0, le=1e6)
    class_prior: Literal["uniform", "empirical"] = item(
        "uniform",
        "class shares that the clustering entropy expects: equal (published) or those of the labelled training rows",
    )


# What ``optim.schedule`` stands for: table S3, and one that classifies better after a fifteenth of the steps, chosen on
# validation rows among learning rates of 1e-3 to 4e-3 (which diverges), batches of 32 and 64 rows, and 20 to 40 epochs
# (``python -m tools.bench quality``).
SCHEDULES: dict[str, dict[str, Any]] = {
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


def _told(schedule: str) -> str:
    held = SCHEDULES[schedule].items()
    return ", ".join(f"{key} {'null' if value is None else str(value).strip('{}')}" for key, value in held).replace(
        "'", ""
    )


class Optim(Section):
    """Optimisers and schedule."""

    schedule: Literal["published", "fast"] = item(
        "published",
        f"several keys at once. published: {_told('published')}; fast: {_told('fast')}. In a file, those "
        "of them that it does not state; set by --set, sweep.conditions or sweep.grid, in place of what it states",
    )
    lr: float = item(1e-4, "learning rate of the VAEs", gt=0, le=10)
    lr_discriminator: float | None = item(None, "learning rate of the discriminator; lr by default", gt=0, le=10)
    lr_schedule: Literal["constant", "cosine"] = item(
        "constant", "learning rates over the epochs: the same (published) or falling to 0 along half a cosine"
    )
    beta1: float = item(0.5, "first moment decay of Adam", ge=0, lt=1)
    beta2: float = item(0.999, "second moment decay of Adam", ge=0, lt=1)
    batch_size: int = item(32, "rows per modality in a global batch", unit="rows", ge=2, le=1_000_000)
    epochs: int = item(300, "epochs at most", unit="epochs", ge=1, le=10_000_000)
    epoch_ends: Literal["shortest", "longest"] = item(
        "shortest",
        "an epoch ends when the shortest modality is used up (published) or the longest, the others starting over",
    )
    labelled_share: float = item(
        0.25,
        "least share of labelled rows in a batch: where fewer are labelled, they are drawn again; 0: never (published)",
        ge=0,
        lt=1,
    )


class EarlyStopping(Section):
    """Stop when the validation metric has not improved."""

    patience: int = item(10, "validations without improvement", unit="validations", ge=1)
    min_delta: float = item(0.0, "smallest change that counts as improvement", ge=0)


Metric = Literal["balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari", "reconstruction_mse"]


class Trainer(Section):
    """How a training runs; `metric`, `early_stopping` and `validate_every` decide which epoch's model is kept."""

    device: str = item("auto", "auto, cpu, cuda or cuda:N", pattern=DEVICE)
    threads: int | None = item(
        None,
        "CPU threads of a training; by default all cores, in a sweep by Ray the cores shared out among its packs",
        ge=1,
        le=4096,
    )
    workers: int = item(
        1,
        "processes that share one training through Ray Train, each with a part of every batch; the step they take "
        "together does not depend on their number",
        ge=1,
        le=4096,
    )
    features_in: Literal["auto", "memory", "disk"] = item(
        "auto",
        "where prepared features are kept while a training runs: memory, or unnamed files in the temporary folder "
        "(TMPDIR), of which memory holds what is in use; auto: on disk where memory would be short. No result differs",
    )
    precision: Literal["fp32", "bf16", "fp16"] = item(
        "fp32",
        "of the networks: bf16 on newer CPUs and GPUs, fp16 on GPUs with scaled losses; losses and all that the "
        "gradient penalty differentiates twice stay in fp32",
    )
    validate_every: int = item(1, "epochs between validations", unit="epochs", ge=1)
    metric: Metric = item(
        "balanced_accuracy", "validation metric that chooses the best epoch; among equals the best reconstruction"
    )
    early_stopping: EarlyStopping | None = item(None, "stop early; never, by default")
    log_every: int = item(10, "steps between transfers of losses to the host", unit="steps", ge=1)
    checkpoint_every: int = item(10, "epochs between checkpoints of the last state", unit="epochs", ge=1)


class Run(Section):
    """One training, whole."""

    name: Name = item("run", "name of the run or study")
    data: Data = item(Data(), "where the rows come from")
    preprocess: Preprocess = item(Preprocess(), "steps per modality")
    scenario: tuple[ScenarioStep, ...] = item((), "changes to the training rows, in order")
    model: Model = item(Model(), "layer sizes")
    objective: Objective = item(Objective(), "losses and weights")
    optim: Optim = item(Optim(), "optimisers and schedule")
    trainer: Trainer = item(Trainer(), "how the training runs")
    seed: int = item(0, "seed of initial weights, row order, noise and scenario choices", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _steps_leave_what_is_scored(self) -> "Run":
        for modality, net in self.model.modalities.items():
            kinds = [step.kind for step in self.preprocess.steps(modality)]
            if net.likelihood in COUNTS:
                allowed, right = "[log1p], with variance before or after it", set(kinds) - {"variance"} == {"log1p"}
            else:
                allowed, right = "none, [impute] or [variance]", set(kinds) <= {"impute", "variance"}
            if net.likelihood != "gaussian" and not right:
                raise ValueError(
                    f"model.modalities.{modality}.likelihood {net.likelihood} needs preprocess.modalities.{modality}: "
                    f"{allowed}; got {', '.join(kinds) or 'none'}"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _scheduled(cls, tree: Any) -> Any:
        """What a schedule stands for, where it is not stated."""
        optim = tree.get("optim") if isinstance(tree, dict) else None
        if not isinstance(optim, dict) or optim.get("schedule") != "fast":
            return tree
        filled = dict(tree)
        for key, value in SCHEDULES["fast"].items():
            section, name = key.split(".")
            held = filled.get(section, {})
            if isinstance(held, dict):
                stated = held.get(name, value)
                both = isinstance(stated, dict) and isinstance(value, dict)
                filled[section] = held | {name: {**value, **stated} if both else stated}
        return filled
