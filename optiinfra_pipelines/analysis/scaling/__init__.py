"""How many replicas a deployment needs, and what one replica carries."""

from optiinfra_pipelines.analysis.scaling.capacity import replica_capacity
from optiinfra_pipelines.analysis.scaling.replicas import recommend_scaling, replicas_needed

__all__ = ["recommend_scaling", "replica_capacity", "replicas_needed"]
