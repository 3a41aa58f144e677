"""The name under which ranking by prompt is imported."""

from .recommendation.prompt_ranking import rank

__all__ = ["rank"]
