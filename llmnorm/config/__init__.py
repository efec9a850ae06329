"""Every key of a run, typed and documented: `load_run_config(path, overrides) -> RunConfig`."""

from llmnorm.config.architecture import ModelSection
from llmnorm.config.checks import BatchPlan, check_batch
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
    EvaluationSection,
    ExportSection,
    GuardSection,
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
    "AdamWSection",
    "BatchPlan",
    "CheckpointSection",
    "ConstantSection",
    "CosineSection",
    "DataSection",
    "EvaluationSection",
    "ExportSection",
    "GuardSection",
    "LinearSection",
    "ModelSection",
    "OptimizerSection",
    "PaperSection",
    "ParallelSection",
    "Preset",
    "RunConfig",
    "ScheduleSection",
    "SpikeSection",
    "TensorBoardSection",
    "TrackerSection",
    "TrackioSection",
    "TrainSection",
    "TrainTokenizer",
    "WandbSection",
    "WsdSection",
    "check_batch",
    "load_run_config",
]
