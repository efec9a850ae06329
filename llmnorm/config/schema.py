"""Every key of a run: `RunConfig` and the sections that are not in a file of their own.

The field definitions are the documentation: `train.py --help` and `configs/schema.json` are generated
from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmnorm.config import yaml_dialect
from llmnorm.config.architecture import ModelSection
from llmnorm.config.base import NonNegativeInt, PositiveInt, Section
from llmnorm.config.batch_schedules import BatchScheduleSection
from llmnorm.config.checks import check
from llmnorm.config.optimizers import OptimizerSection
from llmnorm.config.schedules import CosineSection, ScheduleSection
from llmnorm.config.trackers import TrackerSection

Text = Annotated[str, Field(min_length=1)]
Sources = Text | Annotated[list[Text], Field(min_length=1)]


class TrainTokenizer(Section):
    """A tokenizer trained on the run's own training text."""

    train: Literal["bpe", "unigram"] = Field(
        description="Byte-level BPE (tokenizers) or unigram with byte fallback (sentencepiece)."
    )
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        description="Number of token ids, the 256 bytes and 4 special tokens included; unigram also needs "
        "one for each common character of the text."
    )


class ResamplingSection(Section):
    """Training on the documents that resemble a target, by importance resampling (DSIR, arXiv 2302.03169)."""

    target_files: Sources = Field(description="Text to resemble, in the forms of train_files.")
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="Part of the training documents that is kept."
    )
    seed: NonNegativeInt = Field(0, description="Of the draw; the run's own seed does not change it.")
    ngrams: Annotated[int, Field(ge=1, le=8)] = Field(2, description="Longest run of words that is counted.")
    buckets: PositiveInt = Field(10_000, description="Number of values that n-grams are hashed to.")


class DataSection(Section):
    """What the model reads."""

    train_files: Sources = Field(
        description="Training text: one or more files or globs (.txt, .jsonl, .jsonl.gz, .jsonl.xz, "
        ".jsonl.zst, .parquet), or a Hub dataset such as hf:allenai/c4:en."
    )
    validation_files: Sources | dict[str, Sources] | None = Field(
        None, description="Held-out text, in the same forms; a mapping gives several sets by name."
    )
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0,
        description="Part of the training documents held out when there are no validation_files "
        "(that part of each one's end if there are fewer than 1 / validation_fraction).",
    )
    text_field: Text = Field("text", description="Column or JSON key that holds a document.")
    tokenizer: Text | TrainTokenizer = Field(
        description="Hub name or folder of a tokenizer, or {train: bpe, vocab_size: 32000} to train one."
    )
    resampling: ResamplingSection | None = Field(
        None, description="Choose the training documents that resemble a target; null: all of them."
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(description="Tokens per training sequence.")
    recipe: Literal["packed", "galore"] = Field(
        "packed",
        description="packed: documents joined by EOS and cut into full rows; galore: one document per row, "
        "truncated or padded, as the GaLore family of papers did.",
    )
    document_masking: bool = Field(
        False, description="Block attention between the documents of a packed row and restart its positions."
    )
    prepared_dir: Text | None = Field(
        None, description="Where token shards are kept; null: ~/.cache/llmnorm/prepared."
    )
    prepare_workers: PositiveInt | None = Field(
        None, description="Documents that are tokenized at a time; null: one per CPU core."
    )
    num_workers: NonNegativeInt = Field(
        1, description="Processes that fetch batches ahead of the training step; 0: fetch in line."
    )
    streaming: bool = Field(
        False, description="Read a Hub dataset as it trains instead of preparing it; resuming is approximate."
    )


class LossReweightingSection(Section):
    """Weights of a global batch's samples from their own losses (arXiv 2502.06733)."""

    strategy: Literal["linear", "quadratic", "extremes"] = Field(
        "linear",
        description="linear: less weight on samples below the middle of the batch's losses; quadratic: more "
        "on the middle; extremes: more on both ends.",
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        0.4, description="r of softmax(f / r): weights differ by at most e^(1/r), and are alike for large r."
    )
    warmup_steps: NonNegativeInt = Field(1000, description="Updates of uniform weights at the start.")


class WeightPenaltySection(Section):
    """A term of the loss that sees a hidden matrix alone. See docs/lipschitz.md."""

    name: Literal[
        "norm_loss",
        "soft_orthogonality",
        "srip",
        "gor",
        "lambda_orthogonality",
        "cauchy_schwarz",
        "spectral",
    ] = Field(description="Which.")
    strength: Annotated[float, Field(gt=0.0)] = Field(
        description="What multiplies its sum over the matrices, for example 1e-2 for norm_loss."
    )
    groups: PositiveInt | None = Field(
        None, description="Of gor: blocks of rows, such as heads, each orthogonal by itself; null: 4."
    )
    threshold: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of lambda_orthogonality: the distance below which it is free; null: 1."
    )
    sharpness: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Of lambda_orthogonality: how sharply it sets in at threshold; null: 10."
    )
    power: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Of spectral: power of the largest singular value; null: 2."
    )

    def options(self) -> dict[str, Any]:
        """The options that were given."""
        return self.model_dump(exclude={"name", "strength"}, exclude_none=True)


class TrainSection(Section):
    """The training loop. Batch sizes count sequences."""

    max_steps: PositiveInt = Field(description="Optimizer updates.")
    global_batch_size: PositiveInt = Field(
        description="Sequences per update, over all processes; with a batch_schedule those of its last stage "
        "(staged) or of the start (norm_test)."
    )
    batch_schedule: BatchScheduleSection | None = Field(
        None, description="Batch sizes over the run; null: global_batch_size throughout."
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="Sequences per process and forward pass; null: global_batch_size / processes."
    )
    precision: Literal["fp32", "bf16", "bf16_pure"] = Field(
        "bf16",
        description="fp32; bf16: bf16 autocast with fp32 weights and optimizer state; "
        "bf16_pure: weights and state in bf16 as well.",
    )
    grad_clip: Annotated[float, Field(gt=0.0)] | None = Field(
        1.0, description="Limit of the gradient, as grad_clip_mode takes it; null: no clipping."
    )
    grad_clip_mode: Literal["global", "per_parameter", "agc", "zclip"] = Field(
        "global",
        description="What grad_clip limits: the global norm; each parameter's norm; each row's norm relative "
        "to its weights (AGC, such as 0.01); deviations above the usual global norm (ZClip, such as 2.5).",
    )
    loss_reweighting: LossReweightingSection | None = Field(
        None, description="Weights of samples from their own losses; null: all alike."
    )
    weight_penalties: list[WeightPenaltySection] = Field(
        default_factory=list,
        description="Penalties on hidden matrices, whose gradients join the loss's before clipping.",
    )
    compile: bool = Field(False, description="Compile each block with torch.compile.")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="Recompute in the backward pass: nothing; whole blocks; "
        "or everything but matrix products and attention.",
    )
    log_every: PositiveInt = Field(
        1,
        description="Updates between console lines, and on a GPU between measurements of the optimizer's "
        "time; metrics.jsonl has every update.",
    )
    hang_timeout: Annotated[float, Field(gt=0.0)] | None = Field(
        1800.0,
        description="Seconds that reading or computing one update may take before the run says which process "
        "stands still, shows its stacks and ends (the first update, evaluating and saving may take 4 hours); "
        "null: never, and collectives give up after 4 hours.",
    )
    sample_every: PositiveInt | None = Field(
        None, description="Updates between sampled paragraphs; null: never."
    )
    sample_prompt: str = Field("", description="Text that a sampled paragraph continues.")
    sample_tokens: PositiveInt = Field(128, description="Length of a sampled paragraph in tokens.")


class SpikeSection(Section):
    """Loss-spike detector: roll back to the last good checkpoint and skip the data since then."""

    window: Annotated[int, Field(ge=8)] = Field(
        64, description="Recent losses whose mean and deviation are the norm."
    )
    threshold: Annotated[float, Field(gt=0.0)] = Field(
        6.0, description="A loss this many standard deviations above the window's mean is a spike."
    )
    max_rollbacks: PositiveInt = Field(
        3, description="Stop the run with an error after this many roll-backs."
    )


class GuardSection(Section):
    """What the loop does when numbers go wrong."""

    non_finite_limit: PositiveInt = Field(
        5,
        description="Updates in a row with a non-finite loss or gradient that are skipped before "
        "the run stops.",
    )
    spike: SpikeSection | None = Field(None, description="Loss-spike detector; null: off.")


class CheckpointSection(Section):
    """What survives a restart."""

    every: PositiveInt = Field(
        1000, description="Updates between checkpoints; there is always one at the end."
    )
    keep: PositiveInt = Field(3, description="Newest checkpoints that are kept.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints at multiples of this many updates are kept for good; null: none."
    )
    asynchronous: bool = Field(True, description="Write in the background while training goes on.")


class EvaluationSection(Section):
    """Held-out perplexity during the run."""

    every: PositiveInt | None = Field(
        None, description="Updates between evaluations; null: only at the start and the end."
    )
    at_start: bool = Field(True, description="Evaluate the untrained model.")
    context_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens per evaluation window; null: data.sequence_length."
    )
    stride: PositiveInt | None = Field(
        None, description="Tokens between window starts; null: context_length, so windows do not overlap."
    )
    batch_size: PositiveInt = Field(8, description="Windows per forward pass; does not change the result.")
    max_tokens: PositiveInt | None = Field(
        None, description="Score only the first tokens of each set; null: all."
    )


class DiagnosticsSection(Section):
    """What each layer does, as the run goes on; docs/diagnostics.md. Changes nothing about the run."""

    every: PositiveInt | None = Field(
        None, description="Updates between diagnosed ones; null: none. Costs about one update each."
    )
    sequences: PositiveInt = Field(
        4,
        description="Sequences that streams and attention are measured on, over all processes: the first of "
        "the validation text, or of the training text if there is none.",
    )
    layer_removal: bool = Field(
        False,
        description="Also measure the loss of these sequences without each layer, num_hidden_layers + 1 "
        "forward passes.",
    )


class ParallelSection(Section):
    """How several processes share the work."""

    strategy: Literal["auto", "none", "ddp", "fsdp2", "deepspeed"] = Field(
        "auto",
        description="auto: what the launcher asks for, else ddp if there are several processes, else none.",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="deepspeed: 1 shards optimizer state, 2 gradients too, 3 weights too; null: the "
        "launcher's, else 2.",
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp2: free a block's gathered weights after its forward pass."
    )
    cpu_offload: bool = Field(
        False, description="fsdp2: keep weights and optimizer state in the CPU's memory."
    )
    gradient_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype in which gradients are summed over processes."
    )
    replicas: Annotated[int, Field(ge=1)] = Field(
        1,
        description="fsdp2: copies of the sharded model (HSDP); each is cut over processes / replicas, which "
        "should be those of one node.",
    )
    share_updates: bool = Field(
        True,
        description="ddp: each process computes the whole-matrix updates (Muon and its like) of its share of "
        "the matrices, keeps their state, and sends them to the others.",
    )


class ExportSection(Section):
    """What leaves the run."""

    at_end: bool = Field(
        True, description="Write a self-contained Hugging Face repository after the last update."
    )
    push_to_hub: Text | None = Field(
        None, description="Upload the export to this Hub repository (owner/name); null: no upload."
    )
    private: bool = Field(True, description="Whether the uploaded repository is private.")


class PaperSection(Section):
    """The published number that a run reproduces; it is shown beside the result and changes nothing."""

    perplexity: Annotated[float, Field(gt=0.0)] = Field(description="Published validation perplexity.")
    source: Text = Field(description="Paper and table.")
    note: Text | None = Field(None, description="What to know when comparing.")


class RunConfig(Section):
    """Everything that determines a run."""

    seed: NonNegativeInt = Field(0, description="Seed of the weights and of the data order.")
    output_dir: Text = Field(description="Run directory: config, metrics, checkpoints, export, report.")
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto", description="auto: fused Triton kernels on a GPU, torch elsewhere; triton: never torch."
    )
    plugins: list[Text] = Field(
        default_factory=list,
        description="Python files of norms and optimizers of your own; copied into checkpoints and exports.",
    )
    model: ModelSection = Field(default_factory=ModelSection.defaults, description="What is trained.")
    data: DataSection = Field(description="What the model reads.")
    optimizer: OptimizerSection = Field(description="How weights move.")
    schedule: ScheduleSection = Field(
        default_factory=CosineSection.defaults, description="Learning rate over the run."
    )
    train: TrainSection = Field(description="The training loop.")
    guards: GuardSection = Field(
        default_factory=GuardSection.defaults, description="What happens when numbers go wrong."
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection.defaults, description="What survives a restart."
    )
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection.defaults, description="Held-out perplexity during the run."
    )
    diagnostics: DiagnosticsSection = Field(
        default_factory=DiagnosticsSection.defaults, description="What each layer does during the run."
    )
    parallel: ParallelSection = Field(
        default_factory=ParallelSection.defaults, description="How several processes share the work."
    )
    tracking: list[TrackerSection] = Field(
        default_factory=list, description="Experiment trackers besides metrics.jsonl."
    )
    export: ExportSection = Field(default_factory=ExportSection.defaults, description="What leaves the run.")
    paper: PaperSection | None = Field(None, description="The published number this run reproduces.")

    @model_validator(mode="after")
    def _keys_agree(self) -> RunConfig:
        check(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every key with its resolved value, as plain JSON types."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Every key with its resolved value, as YAML that `load_run_config` reads back unchanged."""
        return yaml_dialect.write(self.to_dict())
