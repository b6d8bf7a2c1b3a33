"""Runtime of var_deploy: loads a bundle and turns class ids into images.

    pipe = var_deploy.load("bundle/")
    out = pipe.generate([3, 7], seeds=[1, 2])
    out.images[0].save("three.png")

Importing it loads neither torch, onnx nor an engine; `load` imports the engine that the bundle runs on.
"""

from .errors import BundleError, CheckpointError, EngineError, RequestError, VarDeployError
from .pipeline import Pipeline, load
from .recipe import Recipe
from .results import Generation, Preview
from .version import __version__

__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineError",
    "Generation",
    "Pipeline",
    "Preview",
    "Recipe",
    "RequestError",
    "VarDeployError",
    "__version__",
    "load",
]
