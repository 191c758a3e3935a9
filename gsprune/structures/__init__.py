"""Coupled tensors as data; what a network is called with; running it, and copies of it to try things on."""

from gsprune.moved import handed_on

__getattr__ = handed_on(__name__)
