"""What is wrong with a network, in words: which layer, which cause, what to do."""

from pws.diagnosis.verdicts.collapse import collapse_verdict, has_collapsed
from pws.diagnosis.verdicts.one_pass import verdict_of
from pws.diagnosis.verdicts.verdict import Cause, Verdict

__all__ = ["Cause", "Verdict", "collapse_verdict", "has_collapsed", "verdict_of"]
