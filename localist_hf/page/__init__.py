"""The page on which people read attention: a text, its blocks, and where each token looks."""

from .passage import Passage
from .reading import Prediction, Reading, read, read_beside
from .saved_page import Page, page_of, saved_page, view


__all__ = ["Page", "Passage", "Prediction", "Reading", "page_of", "read", "read_beside", "saved_page", "view"]
