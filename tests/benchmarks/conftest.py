"""The toy models of the runtime's tests."""

from tests.runtime.conftest import engine, talker, toy

__all__ = ["engine", "talker", "toy"]
