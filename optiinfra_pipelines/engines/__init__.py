"""An engine's metrics page -> rows of the raw tables, whatever the engine and its release.

One file per engine, mostly tables (`vllm`, `sglang`, `tgi`, `trtllm`, `triton`, `dynamo`, `llamacpp`, `lmcache`);
`catalog` tells engines apart, `plan` and `compiler` prepare a layout once, `normalize` reads page after page,
`frames` makes polars frames of many. Pure: no clock, no network. Not here: parsing text (`exposition`), fetching and
writing (`resources`), rates and quantiles (SQL models).
"""

from optiinfra_pipelines.engines.catalog import DIALECTS, PORTS, Identity, Port, identify
from optiinfra_pipelines.engines.frames import to_frames
from optiinfra_pipelines.engines.index import families
from optiinfra_pipelines.engines.normalize import TABLES, Defect, Normalized, normalize
from optiinfra_pipelines.engines.plan import Missing, UnknownEngineError
from optiinfra_pipelines.engines.report import Description, describe

__all__ = [
    "DIALECTS",
    "PORTS",
    "TABLES",
    "Defect",
    "Description",
    "Identity",
    "Missing",
    "Normalized",
    "Port",
    "UnknownEngineError",
    "describe",
    "families",
    "identify",
    "normalize",
    "to_frames",
]
