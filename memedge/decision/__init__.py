"""From statistics to verdicts: the rule, early decisions, reasons in words."""
