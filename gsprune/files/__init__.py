"""Atomic writes, locks between processes, and the names of the files in output directories."""

from gsprune.moved import handed_on

__getattr__ = handed_on(__name__)
