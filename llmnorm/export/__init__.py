"""What leaves a run, as a Hugging Face repository or a stock class, and the weights one starts from."""

from llmnorm.export.convert import Conversion, convert_checkpoint
from llmnorm.export.fold import NotFoldableError, fold_to_stock
from llmnorm.export.fold_statistics import fold_statistics
from llmnorm.export.hf import export_checkpoint, is_export
from llmnorm.export.hub import PushStatus, check_repo_id, push_to_hub
from llmnorm.export.init_from import InitialWeights, initial_weights
from llmnorm.export.source import load_model
from llmnorm.export.verify import ExportMismatch

__all__ = [
    "Conversion",
    "ExportMismatch",
    "InitialWeights",
    "NotFoldableError",
    "PushStatus",
    "check_repo_id",
    "convert_checkpoint",
    "export_checkpoint",
    "fold_statistics",
    "fold_to_stock",
    "initial_weights",
    "is_export",
    "load_model",
    "push_to_hub",
]
