"""How weights move: optimizers, the roles that route parameters to them, and learning-rate schedules."""

from llmnorm.optim.adamp import AdamP
from llmnorm.optim.adamw8bit import AdamW8bit
from llmnorm.optim.apollo import APOLLO, APOLLOMini
from llmnorm.optim.clipping import Clipping, create_clipping
from llmnorm.optim.conda import Conda
from llmnorm.optim.constraints import constrained_modules, project_weights
from llmnorm.optim.dct_adamw import DCTAdamW
from llmnorm.optim.fira import Fira
from llmnorm.optim.fused_backward import FusedBackward, fused_backward_of
from llmnorm.optim.galore import GaLore
from llmnorm.optim.gradnorm_lorp import GradNormLoRP
from llmnorm.optim.int8_weights import quantize_weights
from llmnorm.optim.lamb import LAMB
from llmnorm.optim.lanton import LANTON
from llmnorm.optim.lawn import LAWN
from llmnorm.optim.mean_projection import mean_free_parameters, project_gradient, project_gradients
from llmnorm.optim.muon import Muon
from llmnorm.optim.normuon import NorMuon
from llmnorm.optim.novograd import NovoGrad
from llmnorm.optim.psgd_kron import PSGDKron
from llmnorm.optim.qk_clip import QKClip, qk_clip_of
from llmnorm.optim.registry import Route, create_optimizer, format_routing_table, routing_table
from llmnorm.optim.roles import Role, RoutedParameter, classify_parameters, group_by_role, route_parameters
from llmnorm.optim.scale import SCALE
from llmnorm.optim.schedules import Schedule, create_schedule
from llmnorm.optim.sinkgd import SinkGD
from llmnorm.optim.spam import SPAM
from llmnorm.optim.spectral_constraints import check_feasible
from llmnorm.optim.stable_spam import StableSPAM
from llmnorm.optim.swan import SWAN
from llmnorm.optim.weight_penalties import Penalty, add_penalties, check_penalties, penalty_values

__all__ = [
    "APOLLO",
    "LAMB",
    "LANTON",
    "LAWN",
    "SCALE",
    "SPAM",
    "SWAN",
    "APOLLOMini",
    "AdamP",
    "AdamW8bit",
    "Clipping",
    "Conda",
    "DCTAdamW",
    "Fira",
    "FusedBackward",
    "GaLore",
    "GradNormLoRP",
    "Muon",
    "NorMuon",
    "NovoGrad",
    "PSGDKron",
    "Penalty",
    "QKClip",
    "Role",
    "Route",
    "RoutedParameter",
    "Schedule",
    "SinkGD",
    "StableSPAM",
    "add_penalties",
    "check_feasible",
    "check_penalties",
    "classify_parameters",
    "constrained_modules",
    "create_clipping",
    "create_optimizer",
    "create_schedule",
    "format_routing_table",
    "fused_backward_of",
    "group_by_role",
    "mean_free_parameters",
    "penalty_values",
    "project_gradient",
    "project_gradients",
    "project_weights",
    "qk_clip_of",
    "quantize_weights",
    "route_parameters",
    "routing_table",
]
