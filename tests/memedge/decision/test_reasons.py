"""Rules in words."""

from memedge.decision.reasons import rule_in_words
from memedge.decision.rule import Rule


def test_a_rule_says_its_formula_its_source_and_its_threshold():
    rule = Rule(2.0, -6.1, source="calibrated", threshold=3.44138, operating_point="calibrated")
    assert rule_in_words(rule) == "2 · norm − 6.1 · alignment, γ calibrated; memorized from 3.44138 on"


def test_a_rule_says_where_another_threshold_comes_from():
    given = Rule(1.0, 1.0, source="calibrated", threshold=2.0, operating_point="threshold")
    assert rule_in_words(given).endswith("memorized from 2 on, as given")
    rate = Rule(1.0, 1.0, source="calibrated", threshold=2.0, operating_point="target_fpr=0.01")
    assert rule_in_words(rate).endswith("memorized from 2 on for target_fpr=0.01")


def test_without_a_threshold_nothing_is_memorized():
    assert rule_in_words(Rule()) == "1 · norm + 1 · alignment, γ not fitted"
