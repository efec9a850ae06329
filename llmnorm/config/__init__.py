"""Every key of a run, typed and documented: `load_run_config(path, overrides) -> RunConfig`."""

from llmnorm.config.architecture import ModelSection
from llmnorm.config.batch_plan import (
    SHARDED_GRADIENTS,
    BatchPlan,
    Stage,
    check_batch,
    check_batches,
    norm_test_needs_whole_gradients,
    planned_sequences,
    planned_stages,
)
from llmnorm.config.batch_schedules import BatchScheduleSection, NormTestSection, StagedSection
from llmnorm.config.loading import load_run_config
from llmnorm.config.optimizers import AdamWSection, OptimizerSection
from llmnorm.config.presets import PRESETS, Preset
from llmnorm.config.schedules import (
    ConstantSection,
    CosineSection,
    LinearSection,
    ScheduleSection,
    WsdSection,
)
from llmnorm.config.schema import (
    CheckpointSection,
    DataSection,
    DiagnosticsSection,
    EvaluationSection,
    ExportSection,
    GuardSection,
    LossReweightingSection,
    PaperSection,
    ParallelSection,
    RunConfig,
    SpikeSection,
    TrainSection,
    TrainTokenizer,
)
from llmnorm.config.trackers import TensorBoardSection, TrackerSection, TrackioSection, WandbSection

__all__ = [
    "PRESETS",
    "SHARDED_GRADIENTS",
    "AdamWSection",
    "BatchPlan",
    "BatchScheduleSection",
    "CheckpointSection",
    "ConstantSection",
    "CosineSection",
    "DataSection",
    "DiagnosticsSection",
    "EvaluationSection",
    "ExportSection",
    "GuardSection",
    "LinearSection",
    "LossReweightingSection",
    "ModelSection",
    "NormTestSection",
    "OptimizerSection",
    "PaperSection",
    "ParallelSection",
    "Preset",
    "RunConfig",
    "ScheduleSection",
    "SpikeSection",
    "Stage",
    "StagedSection",
    "TensorBoardSection",
    "TrackerSection",
    "TrackioSection",
    "TrainSection",
    "TrainTokenizer",
    "WandbSection",
    "WsdSection",
    "check_batch",
    "check_batches",
    "load_run_config",
    "norm_test_needs_whole_gradients",
    "planned_sequences",
    "planned_stages",
]
