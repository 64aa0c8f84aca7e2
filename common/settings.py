"""Every run setting, with its default and its allowed range: they stand here and nowhere else.

What names a row of a table (a strategy, a backbone) may be any of that table, which `common.config` knows.
"""

import dataclasses
from typing import Any

from common.errors import UserError
from common.redact import shown_uri

INFERENCES = ("sa", "glca", "both")
PACKS = ("auto", "raw", "jpeg")
ALIGNMENTS = ("landmarks", "box", "resize", "detect")
CODECS = ("float32", "float16", "int8")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # tf32, float16: on CUDA only
TRAINABLE = ("all", "last_block", "head_side", "norm")
LOG_LEVELS = ("debug", "info", "warning", "error")
PRIVACY_UNITS = ("off", "person", "site")


def setting(
    default: object,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    word: str = "",
) -> Any:  # noqa: ANN401 - dataclasses.field is typed the same way
    """A settings field: its default, its range (low <= x <= high, x > above), its choices, or a word for 'decide'."""
    return dataclasses.field(
        default=default, metadata={"low": low, "high": high, "above": above, "choices": choices, "word": word}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """[run]: where the run lives and what makes it repeatable."""

    seed: int = setting(1, low=0)
    out: str = setting("runs")
    log_level: str = setting("info", choices=LOG_LEVELS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """[data]: which pictures are used, how they are aligned, how they are split."""

    image_size: int = setting(112, low=32, high=512)  # px, width and height
    alignment: str = setting("landmarks", choices=ALIGNMENTS)
    box_margin: float = setting(0.0, low=0.0, high=1.0)  # fraction of the box's longer side added around it
    pack: str = setting("auto", choices=PACKS)  # how aligned pictures are kept; auto: raw up to 8 GB, jpeg above
    min_pictures_per_person: int = setting(2, low=1)
    max_people: int | str = setting("all", low=2, word="all")  # the first so many by hash
    max_quarantined_fraction: float = setting(0.05, low=0.0, high=1.0)
    fraction_val_pictures: float = setting(0.1, above=0.0, high=0.5)  # of each training person's pictures
    fraction_test_pictures: float = setting(0.1, above=0.0, high=0.5)
    fraction_val_people: float = setting(0.12, above=0.0, high=0.5)  # where no official split names them
    fraction_test_people: float = setting(0.2, above=0.0, high=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """[augmentation]: random changes of training pictures, on the training device."""

    flip: float = setting(0.5, low=0.0, high=1.0)  # probability
    crop: float = setting(0.1, low=0.0, high=0.5)  # largest shift and zoom, as a fraction of the side
    rotation_rad: float = setting(0.0, low=0.0, high=0.8)  # largest turn
    colour: float = setting(0.2, low=0.0, high=1.0)  # largest relative change of brightness, contrast, saturation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """[model]: backbone (picture -> embedding) and head (embedding -> logits)."""

    backbone: str = setting("resnet18")  # a row of common/models/table.py, as the head and the attention
    width: float = setting(1.0, low=0.125, high=2.0)  # fraction of the channels of every layer
    embedding_size: int = setting(512, low=8, high=4096)
    head: str = setting("cosface")
    head_scale: float = setting(30.0, above=0.0)
    head_sample: float = setting(1.0, above=0.0, high=1.0)  # of the people that a step sees; for 100,000 and more
    head_margin: float = setting(0.35, low=0.0, high=1.5)  # cosface: cosine; arcface: radians; softmax: none
    dropout: float = setting(0.0, low=0.0, high=0.9)  # before the embedding
    pretrained: str = setting("none")  # none | imagenet | FILE.safetensors | models:/NAME@ALIAS | a run's folder or id
    normalisation: str = setting("shared", choices=("shared", "private"))
    norm: str = setting("batch", choices=("batch", "group"))  # group: in the place of every batch normalisation
    patch_size: int = setting(16, low=2, high=64)  # px, of a ViT
    depth: int = setting(12, low=1, high=64)  # blocks of a ViT
    attention: str = setting("sa")  # a ViT's branches in training; dcal: all three
    glca_fraction: float = setting(0.1, above=0.0, high=1.0)  # R: the patches that GLCA asks with
    inference: str = setting("sa", choices=INFERENCES)  # which branch of a ViT embeds; both: side by side


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """[training]: the optimiser and its schedule, which runs over the whole federation."""

    optimiser: str = setting("sgd", choices=("sgd", "adamw"))
    lr: float = setting(0.05, above=0.0)
    momentum: float = setting(0.9, low=0.0, high=0.999)  # sgd only
    weight_decay: float = setting(5e-4, low=0.0)
    batch_size: int = setting(32, low=2)
    epochs: int | str = setting("auto", low=1, word="auto")  # local training; auto: rounds x local_epochs
    warmup_fraction: float = setting(0.1, low=0.0, high=0.9)  # of all steps
    label_smoothing: float = setting(0.0, low=0.0, high=0.9)
    clip_norm: float = setting(5.0, above=0.0)  # of the whole gradient
    trainable: str = setting("all", choices=TRAINABLE)  # what of the backbone is trained; the rest stays as received
    patience: int | str = setting("off", low=1, word="off")  # validations without a better AUC before training stops
    head_warmup_epochs: int = setting(0, low=0)  # a new head alone, before the backbone moves
    spreadout: float = setting(0.0, low=0.0)  # weight of the regulariser that keeps identity vectors apart
    spreadout_margin: float = setting(0.7, above=0.0, high=2.0)  # distance of unit identity vectors that is enough
    triplet: float = setting(0.0, low=0.0)  # weight of the batch-hard triplet loss
    device: str = setting("auto", choices=("auto", "cpu", "cuda", "mps"))  # local training; sites choose their own
    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    memory_format: str = setting("auto", choices=("auto", "contiguous", "channels_last"))
    compile: str = setting("off", choices=("off", "on", "auto"))  # torch.compile; auto: where it pays within the run
    accumulate: int = setting(1, low=1)  # parts in which a batch's gradient is worked out, one after the other
    checkpoint_minutes: float | str = setting("off", above=0.0, word="off")  # between epochs of a round, at a site
    activation_checkpointing: bool = setting(default=False)  # less memory, about a third more time
    threads: int | str = setting("auto", low=1, word="auto")  # CPU threads of each client

    def is_out_of_patience(self, validations_since_best: int) -> bool:
        """Whether training stops early, after so many validations without a better AUC."""
        return isinstance(self.patience, int) and validations_since_best >= self.patience


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinSettings:
    """[twins]: which pairs of pictures training batches are made of; the three numbers count relative to their sum."""

    genuine: float = setting(0.5, above=0.0, high=1.0)  # of one person
    stranger: float = setting(0.25, low=0.0, high=1.0)  # of two families
    twin: float = setting(0.25, low=0.0, high=1.0)  # of two siblings
    partner: str = setting("random", choices=("random", "twin"))  # PWCA's other picture; twin where the batch has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """[ablation]: `facefed train twins` trains one variant for each value of one setting, all else equal."""

    over: str = setting("none")  # a setting's name, such as model.attention; none: no ablation
    values: str = setting("none")  # separated by commas; the others are compared with the first


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """[federation]: the rounds and how their replies become one model."""

    strategy: str = setting("fedavg")  # a row of common/strategies.py
    rounds: int = setting(10, low=1)
    evaluate_only: bool = setting(default=False)  # nothing is trained: everybody scores the first model
    local_epochs: int | str = setting(2, low=1, word="off")  # in each round; off where local_steps is given
    local_steps: int | str = setting("off", low=1, word="off")  # in each round, instead: batches, across epochs' ends
    proximal_mu: float = setting(0.01, low=0.0)  # fedprox only
    server_lr: float | str = setting("auto", above=0.0, word="auto")  # of the server's step; auto: the strategy's own
    server_momentum: float = setting(0.9, low=0.0, high=0.999)  # fedavgm; fedadam and fedyogi: beta 1
    server_beta2: float = setting(0.99, low=0.0, high=0.9999)  # fedadam, fedyogi
    server_adaptivity: float = setting(1e-3, low=1e-9)  # fedadam, fedyogi: tau, added to the root of the moment
    upload_codec: str = setting("float32", choices=CODECS)  # of the clients' changes, see common/protocol/codec.py
    download_codec: str = setting("float32", choices=CODECS)  # of the global model
    trim_fraction: float = setting(0.2, low=0.0, high=0.49)  # fedtrimmedavg: cut at each end of each element
    num_malicious: int = setting(1, low=0)  # krum, multikrum: f, with at least 2 f + 3 clients
    norm_factor: float | str = setting("off", above=1.0, word="off")  # times the median norm; longer is left out
    max_weight_factor: float | str = setting(10.0, low=1.0, word="off")  # times the median client's pictures count
    max_change_factor: float | str = setting(10.0, above=0.0, word="off")  # times the model's norm; longer is refused
    refusals_in_a_row: int | str = setting(3, low=1, word="off")  # after so many a client is set aside
    min_clients: int = setting(2, low=1)  # to begin with, and usable replies of each round
    clients_per_round: int | str = setting("all", low=1, word="all")  # so many are drawn for each round
    join_timeout_s: float = setting(300.0, above=0.0)
    round_timeout_s: float | str = setting("auto", above=0.0, word="auto")  # auto: see server/exchange/patience.py
    silence_s: float = setting(300.0, low=20.0)  # without progress, after which a site that packs or trains is given up
    round_attempts: int = setting(3, low=1)  # how often a round is tried in which too few replies can be used
    run_timeout_s: float | str = setting("off", above=0.0, word="off")  # from each start of the server
    test_every_rounds: int = setting(1, low=1)  # how often the test curve gets a point; never used for a choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """[privacy]: differential privacy of a federation's changes; for what it means see docs/PRIVACY.md.

    Of a person: each site adds the noise itself.  Of a site (one of many virtual clients): the server adds it.
    """

    unit: str = setting("off", choices=PRIVACY_UNITS)  # who is protected
    epsilon: float = setting(8.0, above=0.0, high=1000.0)  # of the whole run, with delta
    delta: float = setting(1e-5, low=1e-12, high=0.1)  # less than one in the people (or sites)
    clip: float = setting(0.1, above=0.0, high=1e6)  # the longest change of a group (or site), Euclidean norm
    group_people: int = setting(16, low=2)  # on average, of whom a group is trained
    noise: str = setting("own", choices=("own", "shared"))  # of a person: whole at each site, or drawn by all together
    colluding_sites: int = setting(1, low=1)  # with shared noise: how many sites may put what they know together

    @property
    def is_shared(self) -> bool:
        """Whether a person is hidden by the noise of several sites."""
        return self.unit == "person" and self.noise == "shared"

    @property
    def is_on(self) -> bool:
        """Whether changes are clipped and noisy."""
        return self.unit != "off"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecaggSettings:
    """[secagg]: secure aggregation (docs/adr/0031-secure-aggregation.md): the server sees sums over the sites only."""

    enabled: bool = setting(default=False)
    threshold: float = setting(0.667, low=0.667, high=1.0)  # of the sites of a round that must stay until it is opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationSettings:
    """[verification]: a public set of pairs (LFW's layout) on which the server scores the global model.

    And how many of its own pairs a client scores in a round: see `common/metrics/design.py`.
    """

    public_dir: str = setting("none")  # a folder with one folder a person; none: no such set
    public_pairs: str = setting("pairs.txt")  # the list of pairs, in public_dir or by its own path
    public_crop: float = setting(1.0, low=0.1, high=1.0)  # the central part of each picture that is used
    by: str = setting("none")  # attributes of people, by commas: a federation's errors by group, once at its end
    group_people: int = setting(10, low=2)  # of a group, before its errors are shown, and before they leave a site
    max_pairs: int | str = setting(10**9, low=1000, word="all")  # of an open set; more are scored by a design


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """[tracking]: MLflow, and TensorBoard beside it. The local record in the run's folder is always written.

    A password in the address is no setting: `config.load_with_address` gives it beside them. So settings can be sent
    and written down as they are.
    """

    enabled: bool = setting(default=True)
    uri: str = setting("sqlite:///mlflow.db")
    experiment_prefix: str = setting("facial_recognition")
    plots: str = setting("all", choices=("all", "final", "none"))
    data_licence: str = setting("not stated")  # of the data sets, for the cards of models
    tensorboard: str = setting("logs/tensorboard")  # a folder with one folder a run; none: no TensorBoard
    system_metrics_s: float | str = setting(10.0, above=0.0, word="off")  # between samples of the machine's use

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", shown_uri(self.uri))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All run settings. They belong to the server; site settings never stand here."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    twins: TwinSettings = TwinSettings()
    ablation: AblationSettings = AblationSettings()
    federation: FederationSettings = FederationSettings()
    privacy: PrivacySettings = PrivacySettings()
    secagg: SecaggSettings = SecaggSettings()
    verification: VerificationSettings = VerificationSettings()
    tracking: TrackingSettings = TrackingSettings()

    def round_pictures(self, num_training_pictures: int) -> int:
        """How many pictures a client that trains on so many processes in a round, each as often as it is seen."""
        epochs, steps = self.federation.local_epochs, self.federation.local_steps
        if isinstance(epochs, int):
            return epochs * num_training_pictures
        return steps * self.training.batch_size if isinstance(steps, int) else 0

    @property
    def total_epochs(self) -> int:
        """How often each picture is processed in the whole federation, and in local training by default.

        Raises UserError where rounds are counted in steps, which are another part of an epoch at each client.
        """
        epochs = self.federation.local_epochs
        if isinstance(epochs, str):
            raise UserError(
                'training.epochs = "auto" is rounds x local_epochs, and federation.local_steps ='
                f" {self.federation.local_steps} counts rounds in steps; give training.epochs (--epochs)."
            )
        return self.federation.rounds * epochs

    @property
    def planned(self) -> int | str:
        """`total_epochs`, or such as "15000 steps" where rounds are counted in those."""
        steps = self.federation.local_steps
        return f"{self.federation.rounds * steps} steps" if isinstance(steps, int) else self.total_epochs

    def total_steps(self, per_epoch: int) -> int:
        """How many batches a client of so many an epoch trains on in the whole federation."""
        steps = self.federation.local_steps
        return self.federation.rounds * steps if isinstance(steps, int) else self.total_epochs * per_epoch

    @property
    def local_training_epochs(self) -> int:
        """Epochs of `facefed train local`: training.epochs, or the federation's total."""
        epochs = self.training.epochs
        return epochs if isinstance(epochs, int) else self.total_epochs
