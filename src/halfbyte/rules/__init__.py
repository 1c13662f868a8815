"""What an optimizer's step does: one file an algorithm, written once and bound to every backend's arithmetic."""

from halfbyte.rules import adagrad, adam, ademamix, adopt, lion, momentum, rmsprop
from halfbyte.rules.definition import ALIASES, Rule, bind, rule, rule_named, rule_names
from halfbyte.rules.encoding import encoding_map
from halfbyte.rules.hyper import FIELDS, hyper

__all__ = [
    "ALIASES",
    "FIELDS",
    "Rule",
    "adagrad",
    "adam",
    "ademamix",
    "adopt",
    "bind",
    "encoding_map",
    "hyper",
    "lion",
    "momentum",
    "rmsprop",
    "rule",
    "rule_named",
    "rule_names",
]
