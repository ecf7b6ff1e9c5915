"""The page on which people read attention: a text, its blocks, and where each token looks."""

from .reading import Passage, Prediction, Reading, read


__all__ = ["Passage", "Prediction", "Reading", "read"]
