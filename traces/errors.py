"""Errors that are the user's to mend: each is one clear line and carries its exit code."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be met; the message names what was found and what is allowed."""

    exit_code = 2


class TraceError(UserError):
    """A trace that is missing, unfinished, corrupt, truncated or of an unknown version."""

    exit_code = 3


class MissingDataError(UserError):
    """A policy needs something that is not at hand: values, or a calibrated wave."""

    exit_code = 4


class InfeasibleBudgetError(UserError):
    """A budget too small for what the policy protects."""

    exit_code = 5


class NoDeviceError(UserError):
    """A GPU or a kernel that is not available."""

    exit_code = 6


class Interrupted(UserError):
    """The user stopped the work; the message says what is kept and how to go on."""

    exit_code = 130
