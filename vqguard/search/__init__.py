"""Nearest codeword: exact, and the same in every batch. See `base.CodewordSearch`."""

from vqguard.search.base import CodewordSearch
from vqguard.search.choose import make_search

__all__ = ["CodewordSearch", "make_search"]
