"""ftso_fast: find a convolutional cell architecture in one iteration (FTSO), on compiled kernels."""

from .config import CIFAR10, CIFAR10_BATCH64, DARTS_CIFAR10, IMAGENET, PC_DARTS_CIFAR10, PRESETS, SearchConfig
from .errors import DataError, NumericalError, UsageError
from .evaluate import evaluate
from .evaluation import EvaluationResult
from .genotype import PRIMITIVES, Genotype
from .network import Network
from .recipes import RECIPES, Recipe
from .result import SearchResult
from .search import search
from .space import DARTS, OPERATOR_SETS, SearchSpace
from .supernet import SuperNet

__version__ = "0.1.0"
__all__ = [
    "CIFAR10",
    "CIFAR10_BATCH64",
    "DARTS",
    "DARTS_CIFAR10",
    "IMAGENET",
    "OPERATOR_SETS",
    "PC_DARTS_CIFAR10",
    "PRESETS",
    "PRIMITIVES",
    "RECIPES",
    "DataError",
    "EvaluationResult",
    "Genotype",
    "Network",
    "NumericalError",
    "Recipe",
    "SearchConfig",
    "SearchResult",
    "SearchSpace",
    "SuperNet",
    "UsageError",
    "evaluate",
    "search",
]
