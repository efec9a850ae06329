"""How weights move: optimizers, the roles that route parameters to them, and learning-rate schedules."""

from llmnorm.optim.registry import Route, create_optimizer, format_routing_table, routing_table
from llmnorm.optim.roles import Role, RoutedParameter, classify_parameters, route_parameters
from llmnorm.optim.schedules import Schedule, create_schedule

__all__ = [
    "Role",
    "Route",
    "RoutedParameter",
    "Schedule",
    "classify_parameters",
    "create_optimizer",
    "create_schedule",
    "format_routing_table",
    "route_parameters",
    "routing_table",
]
