"""What ``lm_sample(constraint=...)`` takes: constraints on the text of a site."""

from lmppl.lm.tokens.constraints.constraint import Constraint, ConstraintState
from lmppl.lm.tokens.constraints.guidance import Grammar, JsonSchema, Regex

__all__ = ["Constraint", "ConstraintState", "Grammar", "JsonSchema", "Regex"]
