"""The name under which saved cards import what serves a recommender."""

from .recommendation.recommender import Recommender
from .recommendation.serving import load

__all__ = ["Recommender", "load"]
