"""What a monitor keeps: the diagnoses of a training in order, and where it went from healthy to unhealthy."""

from __future__ import annotations

import warnings
from dataclasses import replace

from pws._errors import PwsError
from pws.diagnosis.diagnosis import Diagnosis
from pws.diagnosis.verdicts import Verdict, collapse_verdict, has_collapsed


class CollapseWarning(RuntimeWarning):
    """A monitored network went non-finite, or the filters' means took over a layer."""


class HealthHistory:
    """The diagnoses of a training in order, with the last healthy and the first unhealthy one.

    Args:
        shift_bound: a layer is taken over when its shift share starts below this bound and reaches it.
    """

    def __init__(self, shift_bound: float) -> None:
        if not 0 < shift_bound < 1:
            raise PwsError(
                f"shift_bound is a share of the variance, above 0 and below 1; got {shift_bound}. Usual: 0.9."
            )
        self.shift_bound = shift_bound
        self.history: list[Diagnosis] = []
        """The diagnoses of the measured steps, in order."""
        self.last_healthy: Diagnosis | None = None
        self.first_unhealthy: Diagnosis | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the collapse, if there was one, else on the last measurement; None before the first."""
        shown = self.shown
        return None if shown is None else shown.verdict

    @property
    def shown(self) -> Diagnosis | None:
        """The diagnosis to look at: the first unhealthy one, else the last; None before the first."""
        return self.first_unhealthy or (self.history[-1] if self.history else None)

    def _keep(self, diagnosis: Diagnosis, *, scaled: bool) -> None:
        """Add the diagnosis of a whole step. `scaled`: a GradScaler skips the step if its gradients overflow."""
        self.history.append(diagnosis)
        if self._has_collapsed(diagnosis, scaled=scaled):
            self._keep_unhealthy(diagnosis)
        elif not diagnosis.verdict.cause.startswith("non-finite"):
            self._keep_healthy(diagnosis, scaled=scaled)

    def _keep_non_finite(self, diagnosis: Diagnosis) -> None:
        """Add the diagnosis of a forward pass whose outputs or loss are not finite."""
        self.history.append(diagnosis)
        self._keep_unhealthy(diagnosis)

    def _keep_healthy(self, diagnosis: Diagnosis, *, scaled: bool) -> None:
        """A step that nobody took is no collapse: a GradScaler skips those whose gradients overflow."""
        found = self.first_unhealthy
        if found is not None and found.finite_kernels and (found.finite_loss or scaled) and not found.finite:
            self.first_unhealthy = None
        if self.first_unhealthy is None:
            self.last_healthy = diagnosis

    def _keep_unhealthy(self, diagnosis: Diagnosis) -> None:
        if self.first_unhealthy is None:
            verdict = collapse_verdict(self.history)
            self.first_unhealthy = self.history[-1] = replace(diagnosis, verdict=verdict)
            warnings.warn(f"step {diagnosis.step}: {verdict}", CollapseWarning, stacklevel=1)

    def _has_collapsed(self, diagnosis: Diagnosis, *, scaled: bool) -> bool:
        if diagnosis.verdict.cause.startswith("non-finite"):
            return diagnosis.verdict.cause != "non-finite gradient" or not scaled
        return has_collapsed(diagnosis, self.history[0], self.shift_bound)

    def _is_over(self, *, scaled: bool) -> bool:
        """Whether the network is non-finite: there is nothing more to learn, unless a GradScaler skips the step."""
        if self.first_unhealthy is None:
            return False
        last = self.history[-1]
        return not last.finite_loss and not (scaled and last.finite_kernels)
